//! Quantizes a weight to NF4, multiplies with it, writes it as a checkpoint and reads it back.

use halfbyte::four_bit::{self, Spec};
use halfbyte::{Kind, QuantState};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // A weight of 1024 outputs and 512 inputs, row after row; f32, halfbyte::f16 or halfbyte::bf16.
    let (n, k) = (1024, 512);
    let weight: Vec<f32> = (0..n * k).map(|i| (i as f32 * 0.37).sin()).collect();
    let spec = Spec { kind: Kind::Nf4, block: 64, double_quant: true };
    let state = QuantState::quantize(&weight, &[n, k], spec)?;

    // y = x · weightᵀ, straight from the packed bytes.
    let x = vec![0.01_f32; k];
    let mut y = vec![0.0_f32; n];
    let scales = state.scales.view();
    four_bit::matmul_into(&x, (1, n, k), &state.packed, scales, state.kind, state.block, None, &mut y)?;

    // The file is one that bitsandbytes and transformers read.
    let file = safetensors::serialize(state.to_tensors("layer.weight")?, None)?;
    let file = safetensors::SafeTensors::deserialize(&file)?;
    let again = QuantState::from_safetensors(&file, "layer.weight")?;
    assert_eq!(again.dequantize::<f32>()?, state.dequantize::<f32>()?);
    Ok(())
}
