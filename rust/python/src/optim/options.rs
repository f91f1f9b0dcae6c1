//! The arguments of a step.

use halfbyte::optim::{Common, Hyper};
use halfbyte::{Dtype, Error};
use pyo3::intern;
use pyo3::prelude::*;

use super::slot::tensor;
use crate::dlpack::TensorRef;
use crate::errors::raise;

/// What a step is asked for.
pub(super) struct Options {
    pub(super) hyper: Hyper,
    pub(super) common: Common,
    /// The learning rate, where it is on the device.
    pub(super) lr: Option<TensorRef>,
    pub(super) grad_scale: Option<TensorRef>,
    pub(super) found_inf: Option<TensorRef>,
    pub(super) total_norm: Option<TensorRef>,
    pub(super) max_norm: f32,
}

/// Whether decay goes past the gradient.
pub(super) fn is_decoupled(decay: &str) -> Result<bool, Error> {
    match decay {
        "decoupled" => Ok(true),
        "l2" => Ok(false),
        _ => Err(Error::Value { argument: "decay", expected: "decoupled or l2".into(), got: decay.into() }),
    }
}

fn scalar(name: &'static str, object: &Bound<'_, PyAny>) -> PyResult<TensorRef> {
    let found = tensor(name, object)?;
    found.expect_dtype(Dtype::F32).map_err(raise)?;
    crate::expect_len(&found, 1).map_err(raise)?;
    Ok(found)
}

impl Options {
    pub(super) fn new(
        lr: &Bound<'_, PyAny>,
        [beta1, beta2, beta3]: [f64; 3],
        eps: f64,
        weight_decay: f64,
    ) -> PyResult<Self> {
        // Asking a tensor on a device for its number would wait for the device.
        let (lr, on_device) = if lr.hasattr(intern!(lr.py(), "data_ptr"))? {
            (0.0, Some(scalar("lr", lr)?))
        } else {
            (lr.extract()?, None)
        };
        Ok(Self {
            hyper: Hyper { lr, beta1, beta2, beta3, eps, weight_decay, ..Hyper::default() },
            common: Common::default(),
            lr: on_device,
            grad_scale: None,
            found_inf: None,
            total_norm: None,
            max_norm: 0.0,
        })
    }

    /// Takes factors for gradients that are on the device.
    pub(super) fn scaled_by(
        &mut self,
        grad_scale: Option<&Bound<'_, PyAny>>,
        found_inf: Option<&Bound<'_, PyAny>>,
        total_norm: Option<&Bound<'_, PyAny>>,
        max_norm: Option<f64>,
    ) -> PyResult<()> {
        let optional = |name, object: Option<&Bound<'_, PyAny>>| object.map(|object| scalar(name, object)).transpose();
        self.grad_scale = optional("grad_scale", grad_scale)?;
        self.found_inf = optional("found_inf", found_inf)?;
        self.total_norm = optional("total_norm", total_norm)?;
        if self.total_norm.is_some() != max_norm.is_some() {
            let (expected, got) = ("total_norm and max_norm together".into(), "one of them".into());
            return Err(raise(Error::Value { argument: "max_norm", expected, got }));
        }
        self.max_norm = max_norm.unwrap_or(0.0) as f32;
        Ok(())
    }
}
