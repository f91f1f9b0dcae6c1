use super::*;
#[derive(Default)]
pub(super) struct Memory {}
pub(super) fn step(
    _py: Python<'_>,
    _device: i32,
    _rule: Rule,
    _capturable: bool,
    _slots: &mut [Slot],
    _memory: &mut Memory,
    _gradients: &[Gradient<'_>],
    _options: &Options,
) -> PyResult<usize> {
    unimplemented!()
}
