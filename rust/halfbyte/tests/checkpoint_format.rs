//! The checkpoint form: keys, dtypes, shapes and what each refusal says.

use half::{bf16, f16};
use halfbyte::four_bit::Spec;
use halfbyte::state::{Scales, quantized_weights};
use halfbyte::{Dtype, Element, Error, Kind, QuantState};
use proptest::prelude::*;
use safetensors::tensor::TensorView;
use safetensors::{Dtype as Stored, SafeTensors, View};

fn spec(kind: Kind, block: usize, double_quant: bool) -> Spec {
    Spec { kind, block, double_quant }
}

fn ramp(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i as f32 * 0.37).sin() * (1.0 + (i / 50) as f32)).collect()
}

type Tensors = Vec<(String, Stored, Vec<usize>, Vec<u8>)>;

fn tensors(state: &QuantState, prefix: &str) -> Tensors {
    let owned = |(name, t): (String, halfbyte::state::StateTensor<'_>)| {
        (name, t.dtype(), t.shape().to_vec(), t.data().into_owned())
    };
    state.to_tensors(prefix).unwrap().into_iter().map(owned).collect()
}

fn read(tensors: &Tensors, prefix: &str) -> Result<QuantState, Error> {
    let views: Vec<_> = tensors
        .iter()
        .map(|(name, dtype, shape, data)| (name.clone(), TensorView::new(*dtype, shape.clone(), data).unwrap()))
        .collect();
    let bytes = safetensors::serialize(views, None).unwrap();
    QuantState::from_safetensors(&SafeTensors::deserialize(&bytes).unwrap(), prefix)
}

#[test]
fn keys_and_shapes_are_those_of_the_format() {
    let state = QuantState::quantize(&ramp(70 * 65), &[70, 65], spec(Kind::Nf4, 64, true)).unwrap();
    let shapes: Vec<_> =
        tensors(&state, "a.weight").into_iter().map(|(name, dtype, shape, _)| (name, dtype, shape)).collect();
    let json_len = shapes[5].2[0];
    let expected = [
        ("a.weight", Stored::U8, vec![2275, 1]),
        ("a.weight.absmax", Stored::U8, vec![72]),
        ("a.weight.quant_map", Stored::F32, vec![16]),
        ("a.weight.nested_absmax", Stored::F32, vec![1]),
        ("a.weight.nested_quant_map", Stored::F32, vec![256]),
        ("a.weight.quant_state.bitsandbytes__nf4", Stored::U8, vec![json_len]),
    ];
    assert_eq!(shapes, expected.map(|(name, dtype, shape)| (name.to_owned(), dtype, shape)));

    let state = QuantState::quantize(
        &ramp(7).into_iter().map(bf16::from_f32).collect::<Vec<_>>(),
        &[7],
        spec(Kind::Fp4, 32, false),
    )
    .unwrap();
    let plain = tensors(&state, "w");
    let shapes: Vec<_> = plain.iter().map(|(name, dtype, shape, _)| (name.as_str(), *dtype, &shape[..])).collect();
    assert_eq!(shapes[0], ("w", Stored::U8, &[4, 1][..]));
    assert_eq!(shapes[1], ("w.absmax", Stored::F32, &[1][..]));
    assert_eq!(shapes[2], ("w.quant_map", Stored::F32, &[16][..]));
    assert_eq!(shapes[3].0, "w.quant_state.bitsandbytes__fp4");
    assert_eq!(plain.len(), 4);
    assert_eq!(plain[3].3, br#"{"quant_type": "fp4", "blocksize": 32, "dtype": "bfloat16", "shape": [7]}"#);
}

#[test]
fn packed_bytes_are_padded_to_whole_elements() {
    for (storage, size) in [(Stored::U8, 1), (Stored::F16, 2), (Stored::BF16, 2), (Stored::F32, 4), (Stored::F64, 8)] {
        for n in [1, 2, 3, 4, 5, 8, 17] {
            let mut state = QuantState::quantize(&ramp(n), &[n], spec(Kind::Nf4, 64, false)).unwrap();
            state.storage = storage;
            let written = tensors(&state, "w");
            assert_eq!(written[0].2, [n.div_ceil(2).div_ceil(size), 1]);
            assert_eq!(read(&written, "w").unwrap(), state);
        }
    }
}

#[test]
fn tables_of_another_dtype_are_recognized() {
    for kind in Kind::ALL {
        let state = QuantState::quantize(&ramp(100), &[100], spec(kind, 32, true)).unwrap();
        let whole = tensors(&state, "w");
        for table in [2, 4] {
            let values: Vec<f32> =
                whole[table].3.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
            let mut forms: Vec<(Stored, Vec<u8>)> = vec![
                (Stored::F16, values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect()),
                (Stored::BF16, values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect()),
                (Stored::F64, values.iter().flat_map(|&v| f64::from(v).to_le_bytes()).collect()),
            ];
            for (dtype, data) in &forms {
                let mut other = whole.clone();
                (other[table].1, other[table].3) = (*dtype, data.clone());
                assert_eq!(read(&other, "w").unwrap(), state, "{dtype:?}");
            }
            for (dtype, data) in &mut forms {
                let mut other = whole.clone();
                let last = data.len() - 1;
                data[last] ^= 0x80; // the sign of the last value
                (other[table].1, other[table].3) = (*dtype, data.clone());
                let error = read(&other, "w").unwrap_err();
                assert!(matches!(&error, Error::Checkpoint { key, .. } if *key == whole[table].0), "{error}");
            }
        }
    }
}

#[test]
fn a_nested_map_in_fp32_is_taken_as_it_stands() {
    let state = QuantState::quantize(&ramp(1000), &[1000], spec(Kind::Nf4, 32, true)).unwrap();
    let mut other = tensors(&state, "w");
    other[4].3[1020..].copy_from_slice(&2.0f32.to_le_bytes());
    let Scales::Nested(nested) = read(&other, "w").unwrap().scales else { panic!("nested") };
    assert_eq!(nested.map[255], 2.0);

    other[4].3[1020..].copy_from_slice(&f32::INFINITY.to_le_bytes());
    assert!(read(&other, "w").unwrap_err().to_string().contains("w.nested_quant_map"));
}

#[test]
fn what_is_wrong_is_named() {
    let plain = tensors(&QuantState::quantize(&ramp(100), &[100], spec(Kind::Nf4, 32, false)).unwrap(), "w");
    let nested = tensors(&QuantState::quantize(&ramp(100), &[100], spec(Kind::Nf4, 32, true)).unwrap(), "w");
    let refused = |tensors: &Tensors, wanted: &str| {
        let error = read(tensors, "w").unwrap_err();
        assert!(matches!(&error, Error::Checkpoint { key, .. } if key == wanted), "{wanted}: {error}");
    };
    // Each tensor missing, of another shape, of another dtype.
    for whole in [&plain, &nested] {
        for i in 0..whole.len() {
            let name = &whole[i].0;
            let mut other = whole.clone();
            other.remove(i);
            refused(&other, name);

            let mut other = whole.clone();
            other[i].2.insert(0, 1);
            if i == 0 {
                assert!(read(&other, "w").is_ok(), "the packed bytes may have any shape");
            } else {
                refused(&other, name);
            }

            let mut other = whole.clone();
            if other[i].3.len() % 16 == 0 {
                other[i].1 = Stored::C64;
                other[i].2 = vec![other[i].3.len() / 8];
            } else {
                other[i].1 = Stored::BOOL;
                other[i].2 = vec![other[i].3.len()];
            }
            if i > 0 {
                refused(&other, name);
            }
        }
    }
    // One too many.
    for (name, key) in [
        ("w.nested_absmax", "w.nested_absmax"),
        ("w.quant_map.0", "w.quant_map.0"),
        ("w.quant_state.bitsandbytes__af4", "w.quant_state.bitsandbytes__af4"),
        ("w.SCB", "w.SCB"),
    ] {
        let mut other = plain.clone();
        other.push((name.into(), Stored::F32, vec![1], vec![0; 4]));
        refused(&other, key);
    }
    let mut other = plain.clone();
    other.push(("w.quant_state.bitsandbytes__fp4".into(), Stored::U8, vec![2], b"{}".to_vec()));
    let error = read(&other, "w").unwrap_err().to_string();
    assert!(error.contains("bitsandbytes__nf4") && error.contains("bitsandbytes__fp4"), "{error}");
    // A key that contradicts the object.
    let mut other = plain.clone();
    other[3].0 = "w.quant_state.bitsandbytes__fp4".into();
    refused(&other, "w.quant_state.bitsandbytes__fp4");
    // Nested tensors and a plain object.
    let mut other = nested.clone();
    other[5] = plain[3].clone();
    refused(&other, "w.nested_absmax");
    // Neighbours of a similar name are no business of this weight.
    let mut other = plain.clone();
    other.push(("w2".into(), Stored::F32, vec![1], vec![0; 4]));
    other.push(("w2.absmax".into(), Stored::F32, vec![1], vec![0; 4]));
    assert!(read(&other, "w").is_ok());
    assert!(read(&other, "w2").is_err());
    assert!(read(&other, "").is_err());
}

#[test]
fn fields_that_do_not_fit_are_refused() {
    let good = QuantState::quantize(&ramp(100), &[10, 10], spec(Kind::Nf4, 32, true)).unwrap();
    assert_eq!(good.check().unwrap(), 100);
    let broken: [fn(&mut QuantState); 8] = [
        |s| s.block = 33,
        |s| s.block = 64,
        |s| s.shape = vec![10, 11],
        |s| s.shape = vec![usize::MAX, 2],
        |s| s.packed.truncate(s.packed.len() - 1),
        |s| s.storage = Stored::F4,
        |s| s.scales = Scales::Plain(vec![1.0; 3]),
        |s| {
            if let Scales::Nested(nested) = &mut s.scales {
                nested.block = 0;
            }
        },
    ];
    for break_it in broken {
        let mut state = good.clone();
        break_it(&mut state);
        assert!(state.check().is_err());
        assert!(state.dequantize::<f32>().is_err());
        assert!(state.to_tensors("w").is_err());
    }
    let error = QuantState::quantize(&[0.0f32; 6], &[7], spec(Kind::Nf4, 32, false)).unwrap_err();
    assert!(matches!(error, Error::Shape { argument: "shape", .. }));
    let error = QuantState::quantize(&[0.0f32; 6], &[usize::MAX, 6], spec(Kind::Nf4, 32, false)).unwrap_err();
    assert!(matches!(error, Error::Shape { argument: "shape", .. }));
}

#[test]
fn several_weights_in_a_file_are_found() {
    let state = QuantState::quantize(&ramp(64), &[64], spec(Kind::Nf4, 32, false)).unwrap();
    let mut all = state.to_tensors("b.weight").unwrap();
    all.extend(state.to_tensors("a.weight").unwrap());
    let bytes = safetensors::serialize(all, None).unwrap();
    assert_eq!(quantized_weights(&SafeTensors::deserialize(&bytes).unwrap()), ["a.weight", "b.weight"]);
}

/// A weight of each element type survives quantize, write, read with every bit.
fn round_trip<T: Element>(values: &[f32], spec: Spec) {
    let weights: Vec<T> = values.iter().map(|&v| T::from_f32(v)).collect();
    let state = QuantState::quantize(&weights, &[weights.len()], spec).unwrap();
    assert_eq!(state.dtype, T::DTYPE);
    let again = read(&tensors(&state, "w"), "w").unwrap();
    assert_eq!(again, state);
    let bits = |weights: Vec<f32>| weights.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    assert_eq!(bits(again.dequantize().unwrap()), bits(state.dequantize().unwrap()));
}

proptest! {
    #[test]
    fn every_weight_survives(
        values in prop::collection::vec(-1e4f32..1e4, 0..700),
        fp4: bool,
        exponent in 5u32..13,
        double_quant: bool,
        dtype in 0..3usize,
    ) {
        // The mean of no scales is not a number, which equals nothing.
        prop_assume!(!(double_quant && values.is_empty()));
        let spec = spec(if fp4 { Kind::Fp4 } else { Kind::Nf4 }, 1 << exponent, double_quant);
        match [Dtype::F32, Dtype::F16, Dtype::Bf16][dtype] {
            Dtype::F32 => round_trip::<f32>(&values, spec),
            Dtype::F16 => round_trip::<f16>(&values, spec),
            Dtype::Bf16 => round_trip::<bf16>(&values, spec),
        }
    }
}
