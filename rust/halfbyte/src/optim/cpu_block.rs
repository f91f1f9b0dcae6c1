//! A piece of a parameter, one block of 256 elements after the other: widened into buffers that stay in the L1 cache, updated
//! there, rounded and written back.
//!
//! The loops are written once and compiled for every level, and the compiler makes vectors of them; results are the same
//! bits at each. Only elements in and out, and codes, have code of their own.

use super::data::each;
use super::hyper::noise;
use super::reference::by_chance;
use super::rules::{Law, Three, is_sound, scale_read, with_law};
use super::{BLOCK, Common, Extra, Floats, FloatsMut, Rule, Scalars, State};
use crate::device::cpu::Level;

/// A piece of a parameter: whole blocks, but for the end.
pub(super) struct Task<'a> {
    pub(super) p: FloatsMut<'a>,
    pub(super) g: Floats<'a>,
    pub(super) states: Vec<State<'a>>,
    pub(super) extra: Extra<'a>,
    pub(super) scalars: Scalars,
    /// For random bits, if rounding is by chance.
    pub(super) key: Option<u32>,
    /// Number of the first element in the parameter.
    pub(super) first: usize,
    /// What updates are multiplied by.
    pub(super) factor: f32,
    /// Where the sums of squares of parameter and updates go, if they are all that is wanted.
    pub(super) sums: Option<&'a mut (f64, f64)>,
}

impl Task<'_> {
    /// The first `at` elements, a number of whole blocks, and the others.
    pub(super) fn split(self, at: usize) -> (Self, Self) {
        let (p, p_after) = self.p.split_at(at);
        let (g, g_after) = self.g.split_at(at);
        let split = |state| match state {
            State::Full(values) => {
                let (head, tail) = <[f32]>::split_at_mut(values, at);
                (State::Full(head), State::Full(tail))
            }
            State::Eight { codes, absmax } => {
                let (codes, codes_after) = <[u8]>::split_at_mut(codes, at);
                let (absmax, absmax_after) = <[f32]>::split_at_mut(absmax, at / BLOCK);
                (State::Eight { codes, absmax }, State::Eight { codes: codes_after, absmax: absmax_after })
            }
        };
        let (states, states_after) = self.states.into_iter().map(split).unzip();
        let (extra, extra_after) = match self.extra {
            Extra::None => (Extra::None, Extra::None),
            Extra::Master(master) => {
                let (head, tail) = master.split_at_mut(at);
                (Extra::Master(head), Extra::Master(tail))
            }
            Extra::Compensation(lost) => {
                let (head, tail) = lost.split_at(at);
                (Extra::Compensation(head), Extra::Compensation(tail))
            }
        };
        let Self { scalars, key, first, factor, .. } = self;
        (
            Self { p, g, states, extra, scalars, key, first, factor, sums: None },
            Self {
                p: p_after,
                g: g_after,
                states: states_after,
                extra: extra_after,
                scalars,
                key,
                first: first + at,
                factor,
                sums: None,
            },
        )
    }
}

/// Steps a piece, or sums its squares.
pub(super) fn run(level: Level, rule: Rule, task: Task<'_>, common: &Common) {
    with_law!(rule, L => match level {
        // SAFETY: whoever chose the level has checked that the CPU has it.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { with_avx512::<L>(rule, task, common) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { with_avx2::<L>(rule, task, common) },
        _ => blocks::<L, Portable>(rule, task, common),
    });
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn with_avx2<L: Law>(rule: Rule, task: Task<'_>, common: &Common) {
    blocks::<L, super::cpu_avx2::Avx2>(rule, task, common);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn with_avx512<L: Law>(rule: Rule, task: Task<'_>, common: &Common) {
    blocks::<L, super::cpu_avx512::Avx512>(rule, task, common);
}

/// A block's worth of numbers.
pub(super) type Block = [f32; BLOCK];

/// What a level does in its own way. Callers are compiled for the implementing type's instructions.
pub(super) trait Ways {
    /// Widens up to a block of elements. What is behind them is left as it is.
    fn load(from: Floats<'_>, to: &mut Block);
    /// Rounds to nearest even into up to a block of elements.
    fn store(from: &Block, to: FloatsMut<'_>);
    /// `to[i] = map[codes[i]] · scale` for up to a block of codes.
    fn decode(codes: &[u8], signed: bool, scale: f32, to: &mut Block);
    /// [`update`], compiled for the level.
    fn update<L: Law>(
        w: &Block,
        g: &Block,
        states: &mut [Block; 3],
        updates: &mut Block,
        sound: &mut [u32; BLOCK],
        k: &Scalars,
        scaling: (f32, bool),
    );
    /// The block's scale, and the nearest code of each of up to a block of values.
    fn encode(from: &Block, signed: bool, codes: &mut [u8]) -> f32;
}

#[inline(always)]
fn blocks<L: Law, W: Ways>(rule: Rule, mut task: Task<'_>, common: &Common) {
    let k = task.scalars;
    let n = task.g.len();
    let (mut w, mut g, mut updates) = ([0.0; BLOCK], [0.0; BLOCK], [0.0; BLOCK]);
    let mut states = [[0.0; BLOCK]; 3];
    let mut sound = [0u32; BLOCK];
    let mut sums = (0.0, 0.0);
    for from in (0..n).step_by(BLOCK) {
        let to = n.min(from + BLOCK);
        if to - from < BLOCK {
            (w, g, states) = ([0.0; BLOCK], [0.0; BLOCK], [[0.0; BLOCK]; 3]);
        }
        W::load(task.g.range(from, to), &mut g);
        match &task.extra {
            Extra::Master(master) => w[..to - from].copy_from_slice(&master[from..to]),
            _ => W::load(task.p.view().range(from, to), &mut w),
        }
        for ((state, &signed), values) in task.states.iter().zip(rule.signed()).zip(&mut states) {
            match state {
                State::Full(old) => values[..to - from].copy_from_slice(&old[from..to]),
                State::Eight { codes, absmax } => {
                    W::decode(&codes[from..to], signed, scale_read(absmax[from / BLOCK]), values);
                }
            }
        }
        let scaling = (common.scale, common.skip_zeros);
        W::update::<L>(&w, &g, &mut states, &mut updates, &mut sound, &k, scaling);
        if task.sums.is_some() {
            for i in 0..BLOCK {
                updates[i] = if sound[i] == 0 || i >= to - from { 0.0 } else { updates[i] };
            }
            sums = (sums.0 + squares(&w), sums.1 + squares(&updates));
            continue;
        }
        for ((state, &signed), values) in task.states.iter_mut().zip(rule.signed()).zip(&states) {
            match state {
                State::Full(new) => new[from..to].copy_from_slice(&values[..to - from]),
                State::Eight { codes, absmax } => {
                    absmax[from / BLOCK] = W::encode(values, signed, &mut codes[from..to]);
                }
            }
        }
        for i in 0..BLOCK {
            // A change of nothing leaves an element as it is.
            updates[i] = k.shrink.mul_add(w[i], task.factor * updates[i]);
            updates[i] = if sound[i] == 0 { 0.0 } else { updates[i] };
        }
        write::<W>(&mut task, from, to, &w, &updates, &sound);
    }
    if let Some(to) = task.sums {
        *to = sums;
    }
}

/// New states, updates, and which of them count (all bits) or do not (0, and the states are left as they were).
///
/// Its callers are not inlined anywhere: only arguments are known to the compiler to lie apart, and without that it makes no
/// vectors of this.
#[inline(always)]
pub(super) fn update<L: Law>(
    w: &Block,
    g: &Block,
    [a, b, c]: &mut [Block; 3],
    updates: &mut Block,
    sound: &mut [u32; BLOCK],
    k: &Scalars,
    (scale, skip_zeros): (f32, bool),
) {
    let k = *k;
    let skip = if skip_zeros { 0.0 } else { f32::NAN };
    for i in 0..BLOCK {
        let old: Three = [a[i], b[i], c[i]];
        let g = g[i] * scale;
        let (new, update) = L::update(old, k.l2.mul_add(w[i], g), &k);
        #[expect(clippy::needless_bitwise_bool, reason = "a branch would keep this from becoming vectors")]
        let counts = is_sound::<L>(new) & (g != skip);
        sound[i] = if counts { u32::MAX } else { 0 };
        updates[i] = update;
        a[i] = if counts { new[0] } else { old[0] };
        b[i] = if counts { new[1] } else { old[1] };
        c[i] = if counts { new[2] } else { old[2] };
    }
}

/// The sum of squares of a block, which is zero past the end.
#[inline(always)]
fn squares(block: &Block) -> f64 {
    const LANES: usize = 16;
    let mut sums = [0.0; LANES];
    for part in block.chunks_exact(LANES) {
        for (sum, &v) in sums.iter_mut().zip(part) {
            *sum += f64::from(v) * f64::from(v);
        }
    }
    sums.iter().sum()
}

/// Writes `w − deltas` to elements `from` up to `to`.
#[inline(always)]
fn write<W: Ways>(task: &mut Task<'_>, from: usize, to: usize, w: &Block, deltas: &Block, sound: &[u32; BLOCK]) {
    let mut values = [0.0; BLOCK];
    for i in 0..BLOCK {
        values[i] = w[i] - deltas[i];
    }
    let p = task.p.reborrow().range(from, to);
    match &mut task.extra {
        Extra::Master(master) => {
            master[from..to].copy_from_slice(&values[..to - from]);
            W::store(&values, p);
        }
        Extra::Compensation(lost) => {
            let mut before = [0.0; BLOCK];
            W::load(lost.view().range(from, to), &mut before);
            for i in 0..BLOCK {
                values[i] = if sound[i] == 0 { w[i] } else { w[i] + (before[i] - deltas[i]) };
            }
            W::store(&values, p);
            W::load(task.p.view().range(from, to), &mut values);
            for i in 0..BLOCK {
                let after = (w[i] - values[i]) + (before[i] - deltas[i]);
                values[i] = if sound[i] == 0 { before[i] } else { after };
            }
            W::store(&values, lost.reborrow().range(from, to));
        }
        Extra::None => {
            if let Some(key) = task.key {
                let dtype = p.dtype();
                for (i, value) in values[..to - from].iter_mut().enumerate() {
                    *value = by_chance(dtype, *value, noise(key, (task.first + from + i) as u64));
                }
            }
            W::store(&values, p);
        }
    }
}

/// For any CPU.
struct Portable;

impl Ways for Portable {
    fn load(from: Floats<'_>, to: &mut Block) {
        use crate::element::Element;
        each!(Floats, from, a => to.iter_mut().zip(a).for_each(|(to, a)| *to = a.to_f32()));
    }

    fn store(from: &Block, mut to: FloatsMut<'_>) {
        (0..to.len()).for_each(|i| to.set(i, from[i]));
    }

    fn decode(codes: &[u8], signed: bool, scale: f32, to: &mut Block) {
        let map = crate::codebook::dynamic_map(signed);
        to.iter_mut().zip(codes).for_each(|(to, &code)| *to = map[usize::from(code)] * scale);
    }

    fn update<L: Law>(
        w: &Block,
        g: &Block,
        states: &mut [Block; 3],
        updates: &mut Block,
        sound: &mut [u32; BLOCK],
        k: &Scalars,
        scaling: (f32, bool),
    ) {
        update::<L>(w, g, states, updates, sound, k, scaling);
    }

    fn encode(from: &Block, signed: bool, codes: &mut [u8]) -> f32 {
        crate::eight_bit::cpu::encode_dynamic(&from[..codes.len()], signed, codes)
    }
}
