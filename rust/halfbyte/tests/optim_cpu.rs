//! Optimizer steps on the CPU: every level against the reference, to the bit; the reference against double precision; what
//! happens to gradients that are no numbers; rounding by chance; errors.

mod cpu_common;

use cpu_common::{Bits, Noise, assert_same};
use half::{bf16, f16};
use halfbyte::codebook::dynamic_map;
use halfbyte::device::cpu::available_levels;
use halfbyte::layout::block_count;
use halfbyte::optim::{self, BLOCK, Common, Extra, Floats, FloatsMut, Hyper, LIMIT, Parameter, Rule, State};
use halfbyte::{Element, Error};

const LENGTHS: [usize; 9] = [0, 1, 7, 255, 256, 257, 1000, 5003, 2 * 65_536 + 300];

trait Tensor: Element + Bits {
    fn floats(values: &[Self]) -> Floats<'_>;
    fn floats_mut(values: &mut [Self]) -> FloatsMut<'_>;
}

macro_rules! tensor {
    ($type:ty, $name:ident) => {
        impl Tensor for $type {
            fn floats(values: &[Self]) -> Floats<'_> {
                Floats::$name(values)
            }
            fn floats_mut(values: &mut [Self]) -> FloatsMut<'_> {
                FloatsMut::$name(values)
            }
        }
    };
}
tensor!(f32, F32);
tensor!(f16, F16);
tensor!(bf16, Bf16);

/// A parameter and what belongs to it, owned.
#[derive(Clone)]
struct Owned<P> {
    p: Vec<P>,
    full: Vec<Vec<f32>>,
    eight: Vec<(Vec<u8>, Vec<f32>)>,
    master: Vec<f32>,
    lost: Vec<P>,
    squares: f32,
}

impl<P: Tensor> Owned<P> {
    fn new(rule: Rule, p: Vec<P>, eight: bool) -> Self {
        let (n, states) = (p.len(), rule.signed().len());
        let one = (vec![0; n], vec![0.0; block_count(n, BLOCK)]);
        Self {
            p,
            full: if eight { vec![] } else { vec![vec![0.0; n]; states] },
            eight: if eight { vec![one; states] } else { vec![] },
            master: vec![],
            lost: vec![],
            squares: 0.0,
        }
    }

    fn parameter<'a, G: Tensor>(&'a mut self, g: &'a [G], rule: Rule, hyper: &Hyper, t: u64) -> Parameter<'a> {
        let full = self.full.iter_mut().map(|values| State::Full(values));
        let eight = self.eight.iter_mut().map(|(codes, absmax)| State::Eight { codes, absmax });
        let extra = match (self.master.is_empty(), self.lost.is_empty()) {
            (false, _) => Extra::Master(&mut self.master),
            (_, false) => Extra::Compensation(P::floats_mut(&mut self.lost)),
            _ => Extra::None,
        };
        Parameter {
            p: P::floats_mut(&mut self.p),
            g: G::floats(g),
            states: full.chain(eight).collect(),
            extra,
            scalars: hyper.scalars(rule, t),
            index: 3,
            update_squares: Some(&mut self.squares),
        }
    }

    #[track_caller]
    fn assert_same(&self, want: &Self) {
        assert_same(&self.p, &want.p);
        assert_same(&self.lost, &want.lost);
        assert_same(&self.master, &want.master);
        for (got, want) in self.full.iter().zip(&want.full) {
            assert_same(got, want);
        }
        for ((codes, absmax), (want_codes, want_absmax)) in self.eight.iter().zip(&want.eight) {
            assert_eq!(codes, want_codes);
            assert_same(absmax, want_absmax);
        }
    }
}

fn hyper(rule: Rule) -> Hyper {
    Hyper {
        lr: 0.01,
        beta3: 0.99,
        alpha: 2.0,
        t_alpha: 5.0,
        t_beta3: 5.0,
        weight_decay: 0.1,
        dampening: 0.25,
        nesterov: f64::from(u8::from(rule == Rule::Momentum)),
        decoupled: f64::from(u8::from(matches!(rule, Rule::Adam | Rule::AdEMAMix | Rule::Lion))),
        ..Hyper::default()
    }
}

/// Steps of every level, and of the reference, from the same beginning.
fn compare<P: Tensor, G: Tensor>(seed: u64) {
    let mut noise = Noise::new(seed);
    for rule in Rule::ALL {
        for eight in [false, true] {
            for n in LENGTHS {
                let mut want = Owned::new(rule, noise.normal::<P>(n), eight);
                match n % 3 {
                    1 => want.master = want.p.iter().map(|v| v.to_f32()).collect(),
                    2 if size_of::<P>() == 2 => want.lost = vec![P::default(); n],
                    _ => {}
                }
                let common = Common {
                    scale: -0.5,
                    skip_zeros: n % 2 == 0,
                    seed: (n % 3 == 0 && size_of::<P>() == 2).then_some(99),
                };
                let mut others = vec![want.clone(); available_levels().len()];
                for t in 1..=3 {
                    let g: Vec<G> = noise.with_specials(n, 200);
                    let hyper = hyper(rule);
                    optim::reference::step(rule, &mut [want.parameter(&g, rule, &hyper, t)], &common).unwrap();
                    for (level, got) in available_levels().into_iter().zip(&mut others) {
                        let mut work = [got.parameter(&g, rule, &hyper, t)];
                        optim::cpu::step(level, rule, &mut work, &common).unwrap();
                        got.assert_same(&want);
                    }
                }
            }
        }
    }
}

#[test]
fn every_level_is_the_reference() {
    compare::<f32, f32>(1);
    compare::<bf16, bf16>(2);
    compare::<f16, f16>(3);
    compare::<bf16, f32>(4);
    compare::<f32, f16>(5);
}

#[test]
fn limited_updates_are_the_reference() {
    let mut noise = Noise::new(6);
    for rule in [Rule::Lars, Rule::Lamb] {
        for eight in [false, true] {
            for n in LENGTHS {
                let mut want = Owned::new(rule, noise.normal::<f32>(n), eight);
                let mut got = want.clone();
                let hyper = Hyper { max_unorm: 0.02, ..hyper(rule) };
                let g: Vec<f32> = noise.normal(n);
                optim::reference::step(rule, &mut [want.parameter(&g, rule, &hyper, 1)], &Common::default()).unwrap();
                optim::step(rule, &mut [got.parameter(&g, rule, &hyper, 1)], &Common::default()).unwrap();
                // Sums of squares are added in another order.
                for (got, want) in got.p.iter().zip(&want.p) {
                    assert!((got - want).abs() <= 2.0 * f32::EPSILON * want.abs(), "{rule:?} {n}: {got} {want}");
                }
                assert!((got.squares - want.squares).abs() <= 1e-6 * want.squares);
                assert!(n == 0 || want.squares > 0.0);
            }
        }
    }
}

/// The rules in double precision, written the other way round: as papers and torch have them.
fn exact(rule: Rule, h: &Hyper, t: f64, p: f64, g: f64, s: [f64; 3]) -> (f64, [f64; 3]) {
    let g = if h.decoupled == 0.0 { g + h.weight_decay * p } else { g };
    let p = if h.decoupled == 0.0 { p } else { p * (1.0 - h.lr * h.weight_decay) };
    let adam = |s: [f64; 3]| {
        let (m, v) = (h.beta1 * s[0] + (1.0 - h.beta1) * g, h.beta2 * s[1] + (1.0 - h.beta2) * g * g);
        (m, v, (m / (1.0 - h.beta1.powf(t))) / ((v / (1.0 - h.beta2.powf(t))).sqrt() + h.eps))
    };
    match rule {
        Rule::Adam | Rule::Lamb => {
            let (m, v, update) = adam(s);
            (p - h.lr * update, [m, v, 0.0])
        }
        Rule::AdEMAMix => {
            let (m, v, _) = adam([s[0], s[2], 0.0]);
            let slow = h.beta3 * s[1] + (1.0 - h.beta3) * g;
            let root = (v / (1.0 - h.beta2.powf(t))).sqrt() + h.eps;
            (p - h.lr * (m / (1.0 - h.beta1.powf(t)) + h.alpha * slow) / root, [m, slow, v])
        }
        Rule::Lion => {
            let direction = h.beta1 * s[0] + (1.0 - h.beta1) * g;
            let sign = if direction == 0.0 { 0.0 } else { direction.signum() };
            (p - h.lr * sign, [h.beta2 * s[0] + (1.0 - h.beta2) * g, 0.0, 0.0])
        }
        Rule::Momentum | Rule::Lars => {
            let m = if t == 1.0 { g } else { h.beta1 * s[0] + (1.0 - h.dampening) * g };
            let update = if h.nesterov == 0.0 { m } else { g + h.beta1 * m };
            (p - h.lr * update, [m, 0.0, 0.0])
        }
        Rule::RmsProp => {
            let v = h.beta1 * s[0] + (1.0 - h.beta1) * g * g;
            (p - h.lr * g / (v.sqrt() + h.eps), [v, 0.0, 0.0])
        }
        Rule::Adagrad => {
            let v = s[0] + g * g;
            (p - h.lr * g / (v.sqrt() + h.eps), [v, 0.0, 0.0])
        }
    }
}

#[test]
fn the_reference_is_the_rule_in_double_precision() {
    let mut noise = Noise::new(7);
    let n = 300;
    for rule in Rule::ALL {
        let h = Hyper { t_alpha: 0.0, t_beta3: 0.0, ..hyper(rule) };
        let mut ours = Owned::new(rule, noise.normal::<f32>(n), false);
        let mut states = vec![[0.0; 3]; n];
        for t in 1..=50 {
            let g: Vec<f32> = noise.normal(n);
            let before = ours.p.clone();
            optim::reference::step(rule, &mut [ours.parameter(&g, rule, &h, t)], &Common::default()).unwrap();
            for i in 0..n {
                let (p, new) = exact(rule, &h, t as f64, before[i].into(), g[i].into(), states[i]);
                states[i] = new;
                let error = (f64::from(ours.p[i]) - p).abs();
                // The last term is for first moments that all but cancel.
                let bound = f64::from(f32::EPSILON) * (p.abs() + 16.0 * (p - f64::from(before[i])).abs() + 8.0 * h.lr);
                // The sign of a mean that is next to nothing may be either.
                let either = rule == Rule::Lion && error > 0.01;
                assert!(error <= bound || either, "{rule:?} step {t}: {} {p}", ours.p[i]);
            }
        }
    }
}

#[test]
fn elements_with_gradients_that_are_no_numbers_are_left_as_they_are() {
    let mut noise = Noise::new(8);
    for rule in Rule::ALL {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX] {
            let mut ours = Owned::new(rule, noise.normal::<f32>(700), false);
            let g: Vec<f32> = noise.normal(700);
            // Lion's state takes a hundredth of the largest number, which is too much for it.
            let (h, common) = (Hyper { beta2: 0.99, ..hyper(rule) }, Common::default());
            optim::step(rule, &mut [ours.parameter(&g, rule, &h, 1)], &common).unwrap();
            let before = ours.clone();
            let mut g: Vec<f32> = noise.normal(700);
            g[13] = bad;
            optim::step(rule, &mut [ours.parameter(&g, rule, &h, 2)], &common).unwrap();
            assert_eq!(ours.p[13].to_bits(), before.p[13].to_bits(), "{rule:?} {bad}");
            assert!(ours.full.iter().zip(&before.full).all(|(new, old)| new[13] == old[13]));
            assert!(ours.p.iter().zip(&before.p).enumerate().all(|(i, (new, old))| i == 13 || new != old));
            assert!(ours.full.iter().flatten().all(|v| v.abs() < LIMIT));
        }
    }
}

#[test]
fn scales_that_no_step_wrote_begin_anew() {
    let mut noise = Noise::new(9);
    for bad in [f32::NAN, f32::INFINITY, 1e38] {
        let mut ours = Owned::new(Rule::Adam, noise.normal::<f32>(600), true);
        let mut fresh = ours.clone();
        for (codes, absmax) in &mut ours.eight {
            codes.fill(7);
            absmax.fill(bad);
        }
        let g: Vec<f32> = noise.normal(600);
        let h = hyper(Rule::Adam);
        for state in [&mut ours, &mut fresh] {
            optim::step(Rule::Adam, &mut [state.parameter(&g, Rule::Adam, &h, 1)], &Common::default()).unwrap();
        }
        ours.assert_same(&fresh);
    }
}

#[test]
fn second_moments_near_zero_keep_the_nearest_code() {
    // A block of second moments over ten decades: each must come back as the entry of the map that is nearest.
    let n = BLOCK;
    let g: Vec<f32> = (0..n).map(|i| 10f32.powf(-(i as f32) / 51.2)).collect();
    let mut ours = Owned::new(Rule::Adam, vec![0.0f32; n], true);
    let h = Hyper { beta2: 0.5, ..Hyper::default() };
    optim::step(Rule::Adam, &mut [ours.parameter(&g, Rule::Adam, &h, 1)], &Common::default()).unwrap();
    let (codes, absmax) = &ours.eight[1];
    let map = dynamic_map(false);
    for (i, &code) in codes.iter().enumerate() {
        let v = 0.5 * g[i] * g[i] / absmax[0];
        let nearest = map.iter().map(|m| (m - v).abs()).fold(f32::INFINITY, f32::min);
        assert!((map[usize::from(code)] - v).abs() <= nearest * 1.0001 + 1e-12, "{i} {v}");
    }
}

#[test]
fn decay_that_a_16_bit_parameter_cannot_show_in_a_step_shows_in_time() {
    // lr · decay = 1e-5 is far less than half a step of bf16 at 1, which is 1/512.
    let h = Hyper { lr: 1e-3, weight_decay: 1e-2, ..Hyper::default() };
    let run = |mut ours: Owned<bf16>, seed| {
        for t in 1..=20_000 {
            let g = vec![bf16::ZERO; 64];
            let common = Common { seed, ..Common::default() };
            optim::step(Rule::Adam, &mut [ours.parameter(&g, Rule::Adam, &h, t)], &common).unwrap();
        }
        ours.p.iter().map(|v| v.to_f32()).sum::<f32>() / 64.0
    };
    let start = || Owned::new(Rule::Adam, vec![bf16::ONE; 64], false);
    let want = (-0.2f32).exp();
    let master = Owned { master: vec![1.0; 64], ..start() };
    assert!((run(master, None) - want).abs() < 0.004);
    // What is lost has 8 bits too, and a step of it is about as much as the decay of a step.
    assert!((run(Owned { lost: vec![bf16::ZERO; 64], ..start() }, None) - want).abs() < 0.02);
    assert!((run(start(), Some(5)) - want).abs() < 0.02);
    assert_eq!(run(start(), None), 1.0);
}

#[test]
fn rounding_by_chance_is_right_on_average() {
    fn mean<P: Tensor>(value: f32) -> f64 {
        let n = 1 << 16;
        let h = Hyper { lr: f64::from(value), ..Hyper::default() };
        let mut ours = Owned::new(Rule::Lion, vec![P::default(); n], false);
        let common = Common { seed: Some(11), ..Common::default() };
        let g = vec![-1.0f32; n];
        optim::step(Rule::Lion, &mut [ours.parameter(&g, Rule::Lion, &h, 1)], &common).unwrap();
        ours.p.iter().map(|v| f64::from(v.to_f32())).sum::<f64>() / n as f64
    }
    for value in [1.001f32, 0.1234567, 3.3e-6, 2.0f32.powi(-24) * 0.3] {
        for mean in [mean::<bf16>(value), mean::<f16>(value)] {
            let step = f64::from(value).max(2f64.powi(-16)) / 128.0;
            assert!((mean - f64::from(value)).abs() < step / 40.0, "{value} {mean}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_written() {
    let h = Hyper::default();
    let g = vec![1.0f32; 10];
    let refused = |mut ours: Owned<f32>, g: &[f32], rule: Rule| {
        let before = ours.clone();
        let error = optim::step(rule, &mut [ours.parameter(g, rule, &h, 1)], &Common::default());
        ours.assert_same(&before);
        error.unwrap_err()
    };
    let start = |eight| Owned::new(Rule::Adam, vec![1.0f32; 10], eight);
    assert!(matches!(refused(start(false), &g[1..], Rule::Adam), Error::Shape { argument: "grad", .. }));
    assert!(matches!(refused(start(false), &g, Rule::Lion), Error::Value { argument: "states", .. }));
    let mut short = start(true);
    short.eight[1].1.clear();
    assert!(matches!(refused(short, &g, Rule::Adam), Error::Shape { argument: "absmax", .. }));
    let mut short = start(true);
    short.eight[0].0.pop();
    assert!(matches!(refused(short, &g, Rule::Adam), Error::Shape { argument: "state", .. }));
    let short = Owned { master: vec![1.0; 9], ..start(false) };
    assert!(matches!(refused(short, &g, Rule::Adam), Error::Shape { argument: "master", .. }));
}

#[test]
fn rules_go_by_name() {
    for rule in Rule::ALL {
        assert_eq!(Rule::from_name(rule.name()), Some(rule));
    }
    assert_eq!(Rule::from_name("adamw"), None);
}
