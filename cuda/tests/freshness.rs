//! The committed PTX against its sources and manifest, without a compiler: a source that changed without its image, an
//! image edited by hand, or an entry that nobody wrote fails here. `python cuda/build.py --check` compiles and compares.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use halfbyte_kernels::IMAGES;
use serde::Deserialize;
use sha2::{Digest, Sha256};

#[derive(Deserialize)]
struct Manifest {
    image: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    file: String,
    family: String,
    capability: u32,
    specific: bool,
    ptx_version: String,
    sha256: String,
    sources: BTreeMap<String, String>,
    /// Parameters, most registers, most spilled bytes.
    kernels: BTreeMap<String, [u32; 3]>,
}

const FOLDER: &str = env!("CARGO_MANIFEST_DIR");

fn manifest() -> Manifest {
    let text = fs::read_to_string(Path::new(FOLDER).join("ptx/manifest.toml")).expect("the manifest is committed");
    toml::from_str(&text).expect("the manifest is TOML of this shape")
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"))
}

const HINT: &str = "run `python cuda/build.py` and commit what it writes";

#[test]
fn ptx_matches_committed() {
    for entry in manifest().image {
        for (source, hash) in &entry.sources {
            let path = Path::new(FOLDER).parent().expect("cuda/ is in the workspace").join(source);
            let bytes = fs::read(&path).unwrap_or_else(|error| panic!("{source}: {error}"));
            assert_eq!(&digest(&bytes), hash, "{source} changed since {} was built: {HINT}", entry.file);
        }
        let ptx = fs::read(Path::new(FOLDER).join("ptx").join(&entry.file)).expect("every image is committed");
        assert_eq!(digest(&ptx), entry.sha256, "{} is not what was built: {HINT}", entry.file);
    }
}

#[test]
fn embedded_images_are_those_of_the_manifest() {
    let entries = manifest().image;
    assert_eq!(entries.len(), IMAGES.len());
    for (entry, image) in entries.iter().zip(IMAGES) {
        let target = (entry.family.as_str(), entry.capability, entry.specific);
        assert_eq!(target, (image.family, image.capability, image.specific));
        assert_eq!(entry.ptx_version, image.ptx_version);
        let body = image.ptx.strip_suffix('\0').expect("the driver reads up to a NUL");
        assert!(!body.contains('\0'));
        assert_eq!(digest(body.as_bytes()), entry.sha256);
        assert!(body.contains(&format!("\n.version {}\n", entry.ptx_version)), "{}", entry.file);
        assert!(
            body.contains(&format!("\n.target sm_{}{}\n", entry.capability, if entry.specific { "a" } else { "" })),
            "{}",
            entry.file
        );
        for (kernel, [parameters, ..]) in &entry.kernels {
            let start = body.find(&format!(".visible .entry {kernel}(")).unwrap_or_else(|| panic!("no entry {kernel}"));
            let signature = &body[start..start + body[start..].find(')').expect("a signature ends")];
            assert_eq!(signature.matches(".param").count(), *parameters as usize, "{kernel}");
        }
    }
}

#[test]
fn families_have_the_same_kernels_in_every_image() {
    let mut families = BTreeMap::new();
    for entry in manifest().image {
        let names: Vec<_> = entry.kernels.into_keys().collect();
        let first = families.entry(entry.family).or_insert_with(|| names.clone());
        assert_eq!(*first, names, "{}", entry.file);
    }
}

#[test]
fn kernels_do_not_spill() {
    for entry in manifest().image {
        for (kernel, [_, registers, spilled]) in entry.kernels {
            assert!(registers <= 255, "{kernel}");
            // A few bytes outside the loop are ptxas' business; more would be local-memory traffic.
            assert!(spilled <= 16, "{kernel} in {} spills {spilled} bytes", entry.file);
        }
    }
}

#[test]
fn images_stay_small_enough_to_compile_quickly() {
    for image in IMAGES {
        assert!(image.ptx.len() <= 336 << 10, "{} for {}: {} bytes", image.family, image.capability, image.ptx.len());
    }
    assert!(IMAGES.iter().map(|image| image.ptx.len()).sum::<usize>() <= 14 << 20);
}
