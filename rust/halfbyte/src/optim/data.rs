//! A parameter and what belongs to it, in host memory.

use half::{bf16, f16};

use super::Scalars;
use crate::element::{Dtype, Element};

/// Numbers of any floating-point type.
#[derive(Debug, Clone, Copy)]
pub enum Floats<'a> {
    /// 32-bit.
    F32(&'a [f32]),
    /// 16-bit IEEE.
    F16(&'a [f16]),
    /// bfloat16.
    Bf16(&'a [bf16]),
}

/// [`Floats`] to write to.
#[derive(Debug)]
pub enum FloatsMut<'a> {
    /// 32-bit.
    F32(&'a mut [f32]),
    /// 16-bit IEEE.
    F16(&'a mut [f16]),
    /// bfloat16.
    Bf16(&'a mut [bf16]),
}

macro_rules! each {
    ($which:ident, $self:expr, $slice:ident => $body:expr) => {
        match $self {
            $which::F32($slice) => $body,
            $which::F16($slice) => $body,
            $which::Bf16($slice) => $body,
        }
    };
}
pub(super) use each;

impl<'a> Floats<'a> {
    /// Number of elements.
    pub fn len(self) -> usize {
        each!(Self, self, a => a.len())
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Element `i`.
    pub fn get(self, i: usize) -> f32 {
        each!(Self, self, a => a[i].to_f32())
    }

    pub(super) fn split_at(self, at: usize) -> (Self, Self) {
        match self {
            Self::F32(a) => (Self::F32(&a[..at]), Self::F32(&a[at..])),
            Self::F16(a) => (Self::F16(&a[..at]), Self::F16(&a[at..])),
            Self::Bf16(a) => (Self::Bf16(&a[..at]), Self::Bf16(&a[at..])),
        }
    }

    /// Elements `from` up to `to`.
    pub(super) fn range(self, from: usize, to: usize) -> Floats<'a> {
        self.split_at(to).0.split_at(from).1
    }
}

impl FloatsMut<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        each!(Self, self, a => a.len())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The element type.
    pub fn dtype(&self) -> Dtype {
        match self {
            Self::F32(_) => Dtype::F32,
            Self::F16(_) => Dtype::F16,
            Self::Bf16(_) => Dtype::Bf16,
        }
    }

    /// To read.
    pub fn view(&self) -> Floats<'_> {
        match self {
            Self::F32(a) => Floats::F32(a),
            Self::F16(a) => Floats::F16(a),
            Self::Bf16(a) => Floats::Bf16(a),
        }
    }

    /// Rounds to nearest even into element `i`.
    pub fn set(&mut self, i: usize, value: f32) {
        each!(Self, self, a => a[i] = Element::from_f32(value));
    }

    pub(super) fn split_at(self, at: usize) -> (Self, Self) {
        match self {
            Self::F32(a) => {
                let (head, tail) = a.split_at_mut(at);
                (Self::F32(head), Self::F32(tail))
            }
            Self::F16(a) => {
                let (head, tail) = a.split_at_mut(at);
                (Self::F16(head), Self::F16(tail))
            }
            Self::Bf16(a) => {
                let (head, tail) = a.split_at_mut(at);
                (Self::Bf16(head), Self::Bf16(tail))
            }
        }
    }

    /// Elements `from` up to `to`.
    pub(super) fn range(self, from: usize, to: usize) -> Self {
        self.split_at(to).0.split_at(from).1
    }

    pub(super) fn reborrow(&mut self) -> FloatsMut<'_> {
        match self {
            Self::F32(a) => FloatsMut::F32(a),
            Self::F16(a) => FloatsMut::F16(a),
            Self::Bf16(a) => FloatsMut::Bf16(a),
        }
    }
}

/// One state of a parameter.
#[derive(Debug)]
pub enum State<'a> {
    /// fp32, one an element.
    Full(&'a mut [f32]),
    /// A code an element and a scale for each [`super::BLOCK`].
    Eight {
        /// Codes of a dynamic map; see [`super::Rule::signed`] for which.
        codes: &'a mut [u8],
        /// Scales.
        absmax: &'a mut [f32],
    },
}

impl State<'_> {
    /// Elements, and scales if there are any.
    pub(super) fn lens(&self) -> (usize, Option<usize>) {
        match self {
            Self::Full(values) => (values.len(), None),
            Self::Eight { codes, absmax } => (codes.len(), Some(absmax.len())),
        }
    }
}

/// What makes more of a 16-bit parameter than 16 bits.
#[derive(Debug)]
pub enum Extra<'a> {
    /// Nothing.
    None,
    /// The parameter proper, in fp32; the other is its rounding.
    Master(&'a mut [f32]),
    /// What rounding took away so far, of the type of the parameter: Kahan's compensated sum.
    Compensation(FloatsMut<'a>),
}

/// A parameter with its gradient and states.
#[derive(Debug)]
pub struct Parameter<'a> {
    /// The parameter.
    pub p: FloatsMut<'a>,
    /// Its gradient.
    pub g: Floats<'a>,
    /// Its states, as many as the rule has.
    pub states: Vec<State<'a>>,
    /// See [`Extra`].
    pub extra: Extra<'a>,
    /// The numbers of this step.
    pub scalars: Scalars,
    /// Its number in the group, for random bits.
    pub index: u32,
    /// LARS and LAMB: where the sum of squares of the update goes (at a learning rate of one), if it is wanted.
    pub update_squares: Option<&'a mut f32>,
}
