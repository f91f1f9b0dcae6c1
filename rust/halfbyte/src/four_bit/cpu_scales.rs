//! Reading scales, plain or nested, a run at a time.

use crate::layout::Absmax;

/// The scales of a tensor.
#[derive(Clone, Copy)]
pub(super) struct Scales<'a>(pub(super) Absmax<'a>);

impl Scales<'_> {
    /// The scales of blocks `first` on, as many as fit in `into`. The same as [`Absmax::get`], to the bit.
    pub(super) fn read(&self, first: usize, into: &mut [f32]) {
        match self.0 {
            Absmax::Plain(absmax) => into.copy_from_slice(&absmax[first..][..into.len()]),
            Absmax::Nested(nested) => {
                let (mut at, mut rest) = (first, into);
                while !rest.is_empty() {
                    let here = (nested.block - at % nested.block).min(rest.len());
                    let (run, beyond) = rest.split_at_mut(here);
                    let scale = nested.absmax[at / nested.block];
                    for (to, &code) in run.iter_mut().zip(&nested.codes[at..]) {
                        *to = nested.map[usize::from(code)] * scale + nested.offset;
                    }
                    (at, rest) = (at + here, beyond);
                }
            }
        }
    }
}
