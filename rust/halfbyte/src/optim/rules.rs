//! The rules, one element at a time. Every CPU path runs these very functions, the compiler making vectors of them; the
//! CUDA kernels say the same in cuda/include/optim_rules.cuh.

use super::hyper::Scalars;

/// States of an element; rules with fewer leave the others alone.
pub(super) type Three = [f32; 3];

/// What a rule makes of an element.
pub(super) trait Law {
    /// How many states there are.
    const STATES: usize;

    /// New states and update from old states and gradient.
    fn update(states: Three, g: f32, k: &Scalars) -> (Three, f32);

    /// The state that is NaN, infinite or too large if any is, or if the gradient was.
    #[inline(always)]
    fn watched(states: Three) -> f32 {
        states[Self::STATES - 1]
    }
}

#[inline(always)]
fn average(old: f32, new: f32, decay: f32, rest: f32) -> f32 {
    rest.mul_add(new, decay * old)
}

/// An average of g², which does not overflow before its result does.
#[inline(always)]
fn average_square(old: f32, g: f32, decay: f32, rest: f32) -> f32 {
    (rest * g).mul_add(g, decay * old)
}

/// See [`super::Rule::Adam`]; also LAMB, which adds a limit.
pub(super) struct Adam;

impl Law for Adam {
    const STATES: usize = 2;

    #[inline(always)]
    fn update([m, v, _]: Three, g: f32, k: &Scalars) -> (Three, f32) {
        let m = average(m, g, k.beta1, k.rest1);
        let v = average_square(v, g, k.beta2, k.rest2);
        ([m, v, 0.0], k.rate * m / (v.sqrt() + k.eps))
    }
}

/// See [`super::Rule::AdEMAMix`].
pub(super) struct AdEMAMix;

impl Law for AdEMAMix {
    const STATES: usize = 3;

    #[inline(always)]
    fn update([fast, slow, v]: Three, g: f32, k: &Scalars) -> (Three, f32) {
        let fast = average(fast, g, k.beta1, k.rest1);
        let slow = average(slow, g, k.beta3, k.rest3);
        let v = average_square(v, g, k.beta2, k.rest2);
        ([fast, slow, v], k.rate.mul_add(fast, k.rate2 * slow) / (v.sqrt() + k.eps))
    }
}

/// See [`super::Rule::Lion`].
pub(super) struct Lion;

impl Law for Lion {
    const STATES: usize = 1;

    #[inline(always)]
    fn update([m, ..]: Three, g: f32, k: &Scalars) -> (Three, f32) {
        let direction = average(m, g, k.beta1, k.rest1);
        let update = if direction == 0.0 { 0.0 } else { k.rate.copysign(direction) };
        ([average(m, g, k.beta2, k.rest2), 0.0, 0.0], update)
    }
}

/// See [`super::Rule::Momentum`]; also LARS, which adds a limit.
pub(super) struct Momentum;

impl Law for Momentum {
    const STATES: usize = 1;

    #[inline(always)]
    fn update([m, ..]: Three, g: f32, k: &Scalars) -> (Three, f32) {
        let m = average(m, g, k.beta1, k.rest1);
        ([m, 0.0, 0.0], k.rate.mul_add(m, k.rate2 * g))
    }
}

/// See [`super::Rule::RmsProp`].
pub(super) struct RmsProp;

impl Law for RmsProp {
    const STATES: usize = 1;

    #[inline(always)]
    fn update([v, ..]: Three, g: f32, k: &Scalars) -> (Three, f32) {
        let v = average_square(v, g, k.beta1, k.rest1);
        ([v, 0.0, 0.0], k.rate * g / (v.sqrt() + k.eps))
    }
}

/// See [`super::Rule::Adagrad`].
pub(super) struct Adagrad;

impl Law for Adagrad {
    const STATES: usize = 1;

    #[inline(always)]
    fn update([v, ..]: Three, g: f32, k: &Scalars) -> (Three, f32) {
        let v = g.mul_add(g, v);
        ([v, 0.0, 0.0], k.rate * g / (v.sqrt() + k.eps))
    }
}

/// Runs a block with `$law` being the type of a rule.
macro_rules! with_law {
    ($rule:expr, $law:ident => $body:expr) => {
        match $rule {
            $crate::optim::Rule::Adam | $crate::optim::Rule::Lamb => {
                type $law = $crate::optim::rules::Adam;
                $body
            }
            $crate::optim::Rule::AdEMAMix => {
                type $law = $crate::optim::rules::AdEMAMix;
                $body
            }
            $crate::optim::Rule::Lion => {
                type $law = $crate::optim::rules::Lion;
                $body
            }
            $crate::optim::Rule::Momentum | $crate::optim::Rule::Lars => {
                type $law = $crate::optim::rules::Momentum;
                $body
            }
            $crate::optim::Rule::RmsProp => {
                type $law = $crate::optim::rules::RmsProp;
                $body
            }
            $crate::optim::Rule::Adagrad => {
                type $law = $crate::optim::rules::Adagrad;
                $body
            }
        }
    };
}
pub(super) use with_law;

/// Whether an element's step counts: no state is NaN, infinite or too large.
#[inline(always)]
pub(super) fn is_sound<L: Law>(states: Three) -> bool {
    L::watched(states).abs() < super::LIMIT
}

/// How much longer an update may be: the factor for it, from the sums of squares of parameter and update.
pub(super) fn trust(parameter: f64, update: f64, k: &Scalars) -> f32 {
    let most = f64::from(k.trust) * parameter.sqrt() + f64::from(k.trust_eps);
    let update = update.sqrt();
    if k.trust > 0.0 && update > most { (most / update) as f32 } else { 1.0 }
}

/// The sum of squares of an update at a learning rate of one, from that at `lr`.
pub(super) fn at_unit_rate(squares: f64, k: &Scalars) -> f32 {
    let lr = f64::from(k.lr);
    if lr == 0.0 { 0.0 } else { (squares / (lr * lr)) as f32 }
}

/// The scale of a block as it is read: one that no step of ours wrote counts as zero, and the block begins anew.
#[inline(always)]
pub(super) fn scale_read(absmax: f32) -> f32 {
    if absmax.abs() < super::LIMIT { absmax } else { 0.0 }
}
