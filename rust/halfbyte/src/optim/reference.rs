//! What a step means: scalar, one element at a time, slow. Every fast path is tested against this.

use half::{bf16, f16};

use super::hyper::{noise, noise_key};
use super::rules::{Law, Three, at_unit_rate, is_sound, scale_read, trust, with_law};
use super::{BLOCK, Common, Extra, FloatsMut, Parameter, Rule, State, check};
use crate::codebook::dynamic_map;
use crate::eight_bit::Rounding;
use crate::eight_bit::reference::{encode, most_of, scaling};
use crate::element::Dtype;
use crate::error::Result;

/// One step over all `parameters`.
pub fn step(rule: Rule, parameters: &mut [Parameter<'_>], common: &Common) -> Result<()> {
    parameters.iter().try_for_each(|parameter| check(rule, parameter))?;
    for parameter in parameters {
        with_law!(rule, L => one::<L>(rule, parameter, common));
    }
    Ok(())
}

fn one<L: Law>(rule: Rule, parameter: &mut Parameter<'_>, common: &Common) {
    let k = parameter.scalars;
    let n = parameter.p.len();
    let mut states = vec![Three::default(); n];
    for (which, (state, &signed)) in parameter.states.iter().zip(rule.signed()).enumerate() {
        (0..n).for_each(|i| states[i][which] = value(state, signed, i));
    }
    let whole = |parameter: &Parameter<'_>, i: usize| match &parameter.extra {
        Extra::Master(master) => master[i],
        _ => parameter.p.view().get(i),
    };
    // None where an element is to be left as it is.
    let mut updates = vec![None; n];
    for i in 0..n {
        let g = parameter.g.get(i) * common.scale;
        let (new, update) = L::update(states[i], k.l2.mul_add(whole(parameter, i), g), &k);
        if is_sound::<L>(new) && !(common.skip_zeros && g == 0.0) {
            (states[i], updates[i]) = (new, Some(update));
        }
    }
    let mut factor = 1.0;
    if rule.has_trust() {
        let squares = |v: f32| f64::from(v) * f64::from(v);
        let lengths: f64 = (0..n).map(|i| squares(whole(parameter, i))).sum();
        let lengths_of_updates = updates.iter().map(|u| squares(u.unwrap_or(0.0))).sum();
        factor = trust(lengths, lengths_of_updates, &k);
        if let Some(to) = &mut parameter.update_squares {
            **to = at_unit_rate(lengths_of_updates, &k);
        }
    }
    let key = common.seed.map(|seed| noise_key(seed, k.step, parameter.index));
    for (i, update) in updates.into_iter().enumerate() {
        if let Some(update) = update {
            let w = whole(parameter, i);
            let delta = k.shrink.mul_add(w, factor * update);
            write(parameter, i, w, delta, key.map(|key| noise(key, i as u64)));
        }
    }
    for (which, (state, &signed)) in parameter.states.iter_mut().zip(rule.signed()).enumerate() {
        store(state, signed, &states.iter().map(|s| s[which]).collect::<Vec<_>>());
    }
}

/// A state of an element.
fn value(state: &State<'_>, signed: bool, i: usize) -> f32 {
    match state {
        State::Full(values) => values[i],
        State::Eight { codes, absmax } => dynamic_map(signed)[usize::from(codes[i])] * scale_read(absmax[i / BLOCK]),
    }
}

/// A parameter's state, anew.
fn store(state: &mut State<'_>, signed: bool, values: &[f32]) {
    match state {
        State::Full(old) => old.copy_from_slice(values),
        State::Eight { codes, absmax } => {
            for ((values, codes), absmax) in values.chunks(BLOCK).zip(codes.chunks_mut(BLOCK)).zip(absmax.iter_mut()) {
                let (by, scale) = scaling(Rounding::Nearest, most_of(Rounding::Nearest, values.iter().copied()), true);
                *absmax = scale;
                for (v, code) in values.iter().zip(codes) {
                    *code = encode(dynamic_map(signed), by.apply(*v));
                }
            }
        }
    }
}

/// Writes `w − delta`, where `w` is what the element was.
fn write(parameter: &mut Parameter<'_>, i: usize, w: f32, delta: f32, random: Option<u32>) {
    let p = &mut parameter.p;
    match &mut parameter.extra {
        Extra::Master(master) => {
            master[i] = w - delta;
            p.set(i, master[i]);
        }
        Extra::Compensation(rest) => {
            let change = rest.view().get(i) - delta;
            p.set(i, w + change);
            rest.set(i, (w - p.view().get(i)) + change);
        }
        Extra::None => set(p, i, w - delta, random),
    }
}

/// Rounds to nearest, or up or down by chance.
fn set(p: &mut FloatsMut<'_>, i: usize, value: f32, random: Option<u32>) {
    let rounded = random.map_or(value, |random| by_chance(p.dtype(), value, random));
    p.set(i, rounded);
}

/// One of the two neighbours of `value` in a type, the nearer the likelier; a value of the type, NaN and infinity stay.
pub(super) fn by_chance(dtype: Dtype, value: f32, random: u32) -> f32 {
    let bits = value.to_bits();
    match dtype {
        Dtype::F32 => value,
        _ if !value.is_finite() => value,
        Dtype::Bf16 => bf16::from_bits((bits.wrapping_add(random & 0xffff) >> 16) as u16).to_f32(),
        Dtype::F16 if value.abs() >= f32::from(f16::MIN_POSITIVE) => {
            f32::from_bits(bits.wrapping_add(random & 0x1fff) & !0x1fff)
        }
        Dtype::F16 => {
            // Below the normal numbers all steps are 2^−24.
            let steps = value.abs() * (1u32 << 24) as f32 + (random & 0xffff) as f32 / 65536.0;
            (steps.floor() / (1u32 << 24) as f32).copysign(value)
        }
    }
}
