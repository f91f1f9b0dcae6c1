//! Device memory for the length of a launch, from torch's allocator: it is given back in order of the stream, and a graph that is captured
//! has memory of its own for it.

use halfbyte::Dtype;
use pyo3::prelude::*;

use crate::dlpack::Place;
use crate::eager::Torch;

/// Keeps the memory from being given back.
pub(crate) struct Scratch<'py> {
    _tensor: Bound<'py, PyAny>,
    address: u64,
}

impl<'py> Scratch<'py> {
    /// At least so many bytes beside `like`; none where none are wanted, or `like` is no tensor of torch.
    pub(crate) fn beside(like: &Bound<'py, PyAny>, place: Place, bytes: usize) -> PyResult<Option<Self>> {
        if bytes == 0 {
            return Ok(None);
        }
        let torch = Torch::get(like.py())?;
        if !like.is_instance(torch.tensor.bind(like.py()))? {
            return Ok(None);
        }
        let (tensor, view) = torch.empty(like, (Dtype::F32, place), &[], bytes.div_ceil(4))?;
        // `like` may be of another type, of which a new tensor is then too.
        let large_enough = view.byte_len() >= bytes && view.place().is_ok_and(|found| found == place);
        Ok(large_enough.then(|| Self { address: view.address() as u64, _tensor: tensor }))
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }
}
