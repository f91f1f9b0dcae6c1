//! Every kernel that the crate may ask for is in its images. Runs without a GPU.
#![cfg(feature = "cuda")]

use halfbyte::device::cuda::Kernel;

fn check(kernels: Vec<&'static Kernel>) {
    assert!(!kernels.is_empty());
    for kernel in kernels {
        let (family, entry) = kernel.name();
        let images: Vec<_> = halfbyte_kernels::IMAGES.iter().filter(|image| image.family == family).collect();
        assert!(!images.is_empty(), "no image of family {family}");
        for image in images {
            let found = image.ptx.contains(&format!(".visible .entry {entry}("));
            assert!(found, "{entry} is not in {family} for compute_{}", image.capability);
        }
    }
}

#[test]
fn four_bit_kernels_exist() {
    check(halfbyte::four_bit::cuda::kernels());
}

#[test]
fn eight_bit_kernels_exist() {
    check(halfbyte::eight_bit::cuda::kernels());
}

#[test]
fn int8_kernels_exist() {
    check(halfbyte::int8::cuda::kernels());
}

#[test]
fn optimizer_kernels_exist() {
    check(halfbyte::optim::cuda::kernels());
}

#[test]
fn without_a_driver_there_is_one_clear_error() {
    use halfbyte::device::cuda::{Stream, device_count};
    use halfbyte::{Dtype, Error, Kind};
    if device_count().is_ok() {
        return;
    }
    let stream = Stream { device: 0, handle: std::ptr::null_mut() };
    // SAFETY: without a driver nothing is launched, so the pointers are never followed.
    let result = unsafe { halfbyte::four_bit::cuda::quantize(&stream, (16, Dtype::F32), 64, Kind::Nf4, 64, 16, 16) };
    assert!(matches!(result, Err(Error::CudaUnavailable { .. })), "{result:?}");
}
