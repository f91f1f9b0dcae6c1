// Written by cuda/build.py: every image under cuda/ptx.

/// All images, families together, oldest architecture first.
pub static IMAGES: &[Image] = &[
    Image {
        family: "four_bit",
        capability: 75,
        specific: false,
        ptx_version: "8.0",
        ptx: concat!(include_str!("four_bit.compute_75.ptx"), "\0"),
    },
    Image {
        family: "four_bit",
        capability: 80,
        specific: false,
        ptx_version: "8.0",
        ptx: concat!(include_str!("four_bit.compute_80.ptx"), "\0"),
    },
    Image {
        family: "four_bit_simt",
        capability: 75,
        specific: false,
        ptx_version: "8.0",
        ptx: concat!(include_str!("four_bit_simt.compute_75.ptx"), "\0"),
    },
    Image {
        family: "four_bit_simt",
        capability: 80,
        specific: false,
        ptx_version: "8.0",
        ptx: concat!(include_str!("four_bit_simt.compute_80.ptx"), "\0"),
    },
    Image {
        family: "four_bit_mma_bf16",
        capability: 80,
        specific: false,
        ptx_version: "8.0",
        ptx: concat!(include_str!("four_bit_mma_bf16.compute_80.ptx"), "\0"),
    },
    Image {
        family: "four_bit_mma_bf16",
        capability: 90,
        specific: false,
        ptx_version: "8.0",
        ptx: concat!(include_str!("four_bit_mma_bf16.compute_90.ptx"), "\0"),
    },
    Image {
        family: "four_bit_mma_f16",
        capability: 80,
        specific: false,
        ptx_version: "8.0",
        ptx: concat!(include_str!("four_bit_mma_f16.compute_80.ptx"), "\0"),
    },
    Image {
        family: "four_bit_mma_f16",
        capability: 90,
        specific: false,
        ptx_version: "8.0",
        ptx: concat!(include_str!("four_bit_mma_f16.compute_90.ptx"), "\0"),
    },
    Image {
        family: "eight_bit",
        capability: 75,
        specific: false,
        ptx_version: "8.0",
        ptx: concat!(include_str!("eight_bit.compute_75.ptx"), "\0"),
    },
    Image {
        family: "eight_bit",
        capability: 80,
        specific: false,
        ptx_version: "8.0",
        ptx: concat!(include_str!("eight_bit.compute_80.ptx"), "\0"),
    },
];
