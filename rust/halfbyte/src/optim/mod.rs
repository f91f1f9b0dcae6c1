//! Optimizer steps on 32-bit and blockwise 8-bit states: Adam, AdEMAMix, Lion, momentum (SGD), LARS, LAMB, RMSprop, Adagrad.
//!
//! States are those of bitsandbytes, byte for byte: fp32, or one dynamic-map code an element with an fp32 scale for each
//! [`BLOCK`] of them. Arithmetic is fp32 whatever the types of parameter and gradient, and the parameter is rounded once:
//!
//! ```text
//! g = gradient · scale + l2 · p            states and update by the rule (rules.rs)
//! δ = lr · wd · p + trust · update         p ← round(p − δ)
//! ```
//!
//! An element whose gradient is NaN or infinite, or so large that a state would reach [`LIMIT`], is left as it is, with its
//! states, in every rule and width.

#[cfg(feature = "cuda")]
pub mod cuda;

pub mod cpu;
#[cfg(target_arch = "x86_64")]
mod cpu_avx2;
#[cfg(target_arch = "x86_64")]
mod cpu_avx512;
mod cpu_block;
mod data;
mod hyper;
pub mod reference;
mod rules;

pub use data::{Extra, Floats, FloatsMut, Parameter, State};
pub use hyper::{Common, Hyper, Scalars};

use crate::device;
use crate::error::{Error, Result};
use crate::layout::block_count;

/// Elements that share a scale in 8-bit states.
pub const BLOCK: usize = 256;

/// Magnitude that no state reaches.
pub const LIMIT: f32 = (1u128 << 120) as f32;

/// How states and gradient make an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rule {
    /// Adam and AdamW.
    Adam,
    /// Adam with a second, slower average of the gradient.
    AdEMAMix,
    /// The sign of an average.
    Lion,
    /// SGD with momentum.
    Momentum,
    /// Momentum, the update no longer than a part of the parameter.
    Lars,
    /// Adam, the update no longer than a part of the parameter.
    Lamb,
    /// The gradient by the root of an average of its square.
    RmsProp,
    /// The gradient by the root of the sum of its squares.
    Adagrad,
}

impl Rule {
    /// All rules.
    pub const ALL: [Self; 8] =
        [Self::Adam, Self::AdEMAMix, Self::Lion, Self::Momentum, Self::Lars, Self::Lamb, Self::RmsProp, Self::Adagrad];

    /// The name that bitsandbytes has for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Adam => "adam",
            Self::AdEMAMix => "ademamix",
            Self::Lion => "lion",
            Self::Momentum => "momentum",
            Self::Lars => "lars",
            Self::Lamb => "lamb",
            Self::RmsProp => "rmsprop",
            Self::Adagrad => "adagrad",
        }
    }

    /// The inverse of [`Rule::name`].
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|rule| rule.name() == name)
    }

    /// For each state whether its 8-bit form has the signed map. Second moments of rules that have a first one have the
    /// unsigned map; where they are the only state they have the signed one, as bitsandbytes stores them.
    pub const fn signed(self) -> &'static [bool] {
        match self {
            Self::Adam | Self::Lamb => &[true, false],
            Self::AdEMAMix => &[true, true, false],
            Self::Lion | Self::Momentum | Self::Lars | Self::RmsProp | Self::Adagrad => &[true],
        }
    }

    /// Whether the update is limited by the lengths of parameter and update.
    pub const fn has_trust(self) -> bool {
        matches!(self, Self::Lars | Self::Lamb)
    }
}

/// One step over all `parameters` on the CPU.
pub fn step(rule: Rule, parameters: &mut [Parameter<'_>], common: &Common) -> Result<()> {
    cpu::step(device::cpu::level(), rule, parameters, common)
}

/// Checks that what belongs to a parameter has its size.
fn check(rule: Rule, parameter: &Parameter<'_>) -> Result<()> {
    let n = parameter.p.len();
    if parameter.g.len() != n {
        return Err(Error::shape("grad", format!("[{n}]"), format!("[{}]", parameter.g.len())));
    }
    let wanted = rule.signed().len();
    if parameter.states.len() != wanted {
        return Err(Error::value("states", format!("{wanted} of them"), parameter.states.len()));
    }
    for state in &parameter.states {
        let (elements, scales) = state.lens();
        if elements != n {
            return Err(Error::shape("state", format!("[{n}]"), format!("[{elements}]")));
        }
        if let Some(scales) = scales.filter(|&scales| scales != block_count(n, BLOCK)) {
            return Err(Error::shape("absmax", format!("[{}]", block_count(n, BLOCK)), format!("[{scales}]")));
        }
    }
    let extra = match &parameter.extra {
        Extra::None => n,
        Extra::Master(master) => master.len(),
        Extra::Compensation(rest) => rest.len(),
    };
    if extra != n {
        return Err(Error::shape("master", format!("[{n}]"), format!("[{extra}]")));
    }
    Ok(())
}
