//! What the user sets, and the fp32 numbers that a step computes with.

use super::Rule;

/// Hyperparameters. Kernels read it as it lies in memory: 16 numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C)]
pub struct Hyper {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first average (momentum; RMSprop's `alpha`).
    pub beta1: f64,
    /// Decay of the second average.
    pub beta2: f64,
    /// Decay of AdEMAMix's slow average.
    pub beta3: f64,
    /// Weight of AdEMAMix's slow average.
    pub alpha: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Part of the gradient that momentum does not take, from the second step on.
    pub dampening: f64,
    /// Steps over which AdEMAMix's `alpha` rises; 0 for at once.
    pub t_alpha: f64,
    /// Steps over which AdEMAMix's `beta3` rises; 0 for at once.
    pub t_beta3: f64,
    /// LARS and LAMB: the update's length is at most this part of the parameter's; 0 for no limit.
    pub max_unorm: f64,
    /// 1 if decay shrinks the parameter by itself, 0 if it is added to the gradient.
    pub decoupled: f64,
    /// 1 if averages are corrected for having begun at zero.
    pub bias_correction: f64,
    /// 1 for Nesterov's momentum.
    pub nesterov: f64,
    /// Room.
    pub reserved: [f64; 2],
}

impl Default for Hyper {
    fn default() -> Self {
        Self {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            beta3: 0.0,
            alpha: 0.0,
            eps: 1e-8,
            weight_decay: 0.0,
            dampening: 0.0,
            t_alpha: 0.0,
            t_beta3: 0.0,
            max_unorm: 0.0,
            decoupled: 1.0,
            bias_correction: 1.0,
            nesterov: 0.0,
            reserved: [0.0; 2],
        }
    }
}

/// The numbers of one step. Kernels read it as it lies in memory: 16 words.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[repr(C)]
pub struct Scalars {
    /// Decay of the first average, and what the gradient comes in with.
    pub beta1: f32,
    /// See `beta1`.
    pub rest1: f32,
    /// The same of the second average.
    pub beta2: f32,
    /// See `beta2`.
    pub rest2: f32,
    /// The same of the slow average.
    pub beta3: f32,
    /// See `beta3`.
    pub rest3: f32,
    /// Factor of the update, bias correction included.
    pub rate: f32,
    /// Factor of the slow average's part, or of the gradient's with Nesterov's momentum.
    pub rate2: f32,
    /// Added to the root of the second moment, bias correction included.
    pub eps: f32,
    /// lr · weight decay, if decoupled.
    pub shrink: f32,
    /// Weight decay, if it is added to the gradient.
    pub l2: f32,
    /// lr · `max_unorm`: the update may be this times the parameter's length, ...
    pub trust: f32,
    /// ... plus lr · eps.
    pub trust_eps: f32,
    /// Number of the step, for random bits.
    pub step: u32,
    /// Learning rate.
    pub lr: f32,
    /// Room.
    pub reserved: u32,
}

impl Hyper {
    /// The numbers of a parameter's step `t`, which counts from 1.
    pub fn scalars(&self, rule: Rule, t: u64) -> Scalars {
        let steps = t as f64;
        let correction = |beta: f64| if self.bias_correction == 0.0 { 1.0 } else { 1.0 - beta.powf(steps) };
        let (mut beta1, mut rest1) = (self.beta1, 1.0 - self.beta1);
        let (mut rate, mut rate2, mut eps) = (self.lr, 0.0, self.eps);
        let beta3 = self.beta3_at(steps);
        match rule {
            Rule::Adam | Rule::Lamb | Rule::AdEMAMix => {
                // lr · (m/c1 + α·m2) / (√v/√c2 + eps), with √c2 taken out of the root.
                let root = correction(self.beta2).sqrt();
                rate2 = self.lr * root * self.alpha_at(steps);
                rate = self.lr * root / correction(self.beta1);
                eps = self.eps * root;
            }
            Rule::Momentum | Rule::Lars => {
                if self.nesterov != 0.0 {
                    (rate, rate2) = (self.lr * self.beta1, self.lr);
                }
                (beta1, rest1) = if t <= 1 { (0.0, 1.0) } else { (self.beta1, 1.0 - self.dampening) };
            }
            Rule::Adagrad => beta1 = 1.0,
            Rule::Lion | Rule::RmsProp => {}
        }
        let decoupled = self.decoupled != 0.0;
        Scalars {
            beta1: beta1 as f32,
            rest1: rest1 as f32,
            beta2: self.beta2 as f32,
            rest2: (1.0 - self.beta2) as f32,
            beta3: beta3 as f32,
            rest3: (1.0 - beta3) as f32,
            rate: rate as f32,
            rate2: rate2 as f32,
            eps: eps as f32,
            shrink: if decoupled { self.lr * self.weight_decay } else { 0.0 } as f32,
            l2: if decoupled { 0.0 } else { self.weight_decay } as f32,
            trust: (self.lr * self.max_unorm) as f32,
            trust_eps: (self.lr * self.eps) as f32,
            step: t as u32,
            lr: self.lr as f32,
            reserved: 0,
        }
    }

    /// The slow average's weight, which rises linearly.
    fn alpha_at(&self, steps: f64) -> f64 {
        if self.t_alpha > 0.0 { (steps * self.alpha / self.t_alpha).min(self.alpha) } else { self.alpha }
    }

    /// The slow average's decay, whose half-life rises linearly (AdEMAMix, arXiv 2409.03137, appendix A.1).
    fn beta3_at(&self, steps: f64) -> f64 {
        if self.t_beta3 <= 0.0 {
            return self.beta3;
        }
        let (from, to, part) = (self.beta1.ln(), self.beta3.ln(), steps / self.t_beta3);
        (from * to / ((1.0 - part) * to + part * from)).exp().min(self.beta3)
    }
}

/// What is the same for all parameters of a step, beside hyperparameters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Common {
    /// Gradients are multiplied by it; negative to maximize.
    pub scale: f32,
    /// Elements whose gradient is zero are left as they are, with their states.
    pub skip_zeros: bool,
    /// Seed of stochastic rounding to 16-bit parameters, if that is wanted.
    pub seed: Option<u64>,
}

impl Default for Common {
    fn default() -> Self {
        Self { scale: 1.0, skip_zeros: false, seed: None }
    }
}

/// A bijection of 32-bit words whose outputs look random for inputs that do not (lowbias32, by C. Wellons).
#[inline(always)]
pub(super) fn mix(mut x: u32) -> u32 {
    x = (x ^ x >> 16).wrapping_mul(0x7feb_352d);
    x = (x ^ x >> 15).wrapping_mul(0x846c_a68b);
    x ^ x >> 16
}

/// What random bits depend on beside the element's number: seed, step, the parameter's index.
pub(super) fn noise_key(seed: u64, step: u32, index: u32) -> u32 {
    mix(mix(mix(mix(seed as u32).wrapping_add((seed >> 32) as u32)).wrapping_add(step)).wrapping_add(index))
}

/// Random bits of an element.
#[inline(always)]
pub(super) fn noise(key: u32, element: u64) -> u32 {
    mix(element as u32 ^ mix(key.wrapping_add((element >> 32) as u32)))
}
