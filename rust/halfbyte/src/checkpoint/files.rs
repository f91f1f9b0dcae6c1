//! Writing so that a kill at any point leaves whole files: a folder under way, and files that come into it by a rename.
//!
//! While a conversion runs its folder has a `.halfbyte` in it, with a lock, the file that is being written, and a journal that
//! says which conversion this is. A file of the result has its name only once it is on disk.

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::header::{self, Entry, LENGTH_BYTES};
use super::plan::Output;
use super::{Existing, file_error, path_text};
use crate::error::{Error, Result};

const STATE: &str = ".halfbyte";
const JOURNAL: &str = "journal";
const LOCK: &str = "lock";
const PARTIAL: &str = "partial";

/// The folder that is written to.
pub(super) struct Destination {
    folder: PathBuf,
    /// Held until the end; the system lets go of it when the process ends, however it does.
    lock: File,
}

impl Destination {
    /// Begins the conversion that `journal` describes, or goes on with it.
    pub(super) fn open(folder: &Path, existing: Existing, journal: &str) -> Result<Self> {
        let failed = |e: std::io::Error| file_error("write to", path_text(folder), &e);
        let state = folder.join(STATE);
        let begun = state.join(JOURNAL);
        if existing == Existing::Refuse || existing == Existing::Resume {
            refuse_other(folder, &begun, existing)?;
        }
        fs::create_dir_all(folder).map_err(failed)?;
        if fs::symlink_metadata(&state).is_ok_and(|m| !m.is_dir()) {
            return Err(Error::file("write to", path_text(folder), format!("`{STATE}` in it is no folder")));
        }
        fs::create_dir_all(&state).map_err(failed)?;
        let lock = OpenOptions::new().create(true).append(true).open(state.join(LOCK)).map_err(failed)?;
        if lock.try_lock().is_err() {
            return Err(Error::file("write to", path_text(folder), "another process is converting to it"));
        }
        let destination = Self { folder: folder.to_owned(), lock };
        let previous = fs::read_to_string(&begun).ok();
        match (previous, existing) {
            (Some(previous), Existing::Resume) if previous == journal => {}
            (Some(previous), Existing::Resume) => {
                let line = |text: &str, other: &str| {
                    let differs = text.lines().zip(other.lines()).find(|(a, b)| a != b).map(|(a, _)| header::brief(a));
                    differs.unwrap_or_else(|| "another set of files".into())
                };
                let message = format!(
                    "the conversion that was interrupted there was another one ({}, now {})",
                    line(&previous, journal),
                    line(journal, &previous)
                );
                return Err(Error::file("resume in", path_text(folder), message));
            }
            (_, Existing::Overwrite) => {
                destination.clear()?;
                destination.place(&state.join(JOURNAL), journal.as_bytes())?;
            }
            (_, Existing::Refuse | Existing::Resume) => destination.place(&state.join(JOURNAL), journal.as_bytes())?,
        }
        Ok(destination)
    }

    /// Removes the checkpoint that is there; the config first, without which nothing loads it.
    fn clear(&self) -> Result<()> {
        let failed = |e: std::io::Error| file_error("write to", path_text(&self.folder), &e);
        let mut names = vec![super::config::NAME.to_owned()];
        for entry in self.folder.read_dir().map_err(failed)? {
            let name = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
            if name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json") {
                names.push(name);
            }
        }
        for path in names.iter().map(|name| self.folder.join(name)) {
            if fs::symlink_metadata(&path).is_ok() {
                fs::remove_file(&path).map_err(|e| file_error("replace", path_text(&path), &e))?;
            }
        }
        sync(&self.folder)
    }

    /// The file of this name, if a conversion before this one has finished it.
    pub(super) fn finished(&self, name: &str, outputs: &[&Output]) -> Result<Option<u64>> {
        let path = self.folder.join(name);
        let Ok(mut file) = File::open(&path) else { return Ok(None) };
        let length = file.metadata().map_err(|e| file_error("read", path_text(&path), &e))?.len();
        let Ok((entries, _)) = header::read(&mut file, length, name) else { return Ok(None) };
        let same = entries.len() == outputs.len()
            && order(outputs).into_iter().zip(&entries).all(|(i, entry)| {
                let output = outputs[i];
                output.name == entry.name && output.dtype == entry.dtype && (output.text || output.shape == entry.shape)
            });
        Ok(same.then(|| entries.iter().map(Entry::bytes).sum()))
    }

    /// A file of these tensors, to be filled.
    pub(super) fn shard(&self, outputs: &[&Output]) -> Result<Shard> {
        Ok(Shard::new(self.partial()?, outputs))
    }

    fn partial(&self) -> Result<Partial> {
        let path = self.folder.join(STATE).join(PARTIAL);
        let failed = |e: std::io::Error| file_error("write", path_text(&path), &e);
        if fs::symlink_metadata(&path).is_ok() {
            fs::remove_file(&path).map_err(failed)?;
        }
        let file = OpenOptions::new().write(true).create_new(true).open(&path).map_err(failed)?;
        Ok(Partial { file, path })
    }

    /// Gives the file its name, when it is on disk.
    pub(super) fn finish(&self, partial: Partial, name: &str) -> Result<()> {
        self.rename(partial, &self.folder.join(name))
    }

    fn rename(&self, Partial { file, path }: Partial, to: &Path) -> Result<()> {
        let failed = |e: std::io::Error| file_error("write", path_text(to), &e);
        file.sync_all().map_err(failed)?;
        drop(file);
        fs::rename(&path, to).map_err(failed)?;
        sync(to.parent().unwrap_or(&self.folder))
    }

    fn place(&self, path: &Path, data: &[u8]) -> Result<()> {
        let mut partial = self.partial()?;
        partial.write(data)?;
        self.rename(partial, path)
    }

    /// Writes a small file.
    pub(super) fn write(&self, name: &str, data: &[u8]) -> Result<()> {
        self.place(&self.folder.join(name), data)
    }

    /// Copies a file.
    pub(super) fn copy(&self, from: &Path, name: &Path) -> Result<()> {
        let failed = |e: std::io::Error| file_error("copy", path_text(from), &e);
        let to = self.folder.join(name);
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent).map_err(failed)?;
        }
        let mut partial = self.partial()?;
        std::io::copy(&mut File::open(from).map_err(failed)?, &mut partial.file).map_err(failed)?;
        self.rename(partial, &to)
    }

    /// Takes the journal away: the result is whole.
    pub(super) fn close(self) -> Result<()> {
        let state = self.folder.join(STATE);
        let failed = |e: std::io::Error| file_error("write to", path_text(&state), &e);
        fs::remove_file(state.join(JOURNAL)).map_err(failed)?;
        sync(&self.folder)?;
        fs::remove_file(state.join(LOCK)).map_err(failed)?;
        let _ = self.lock.unlock();
        // What somebody else has put into it stays.
        let _ = fs::remove_dir(&state);
        sync(&self.folder)
    }
}

/// Has the system write the names in a folder to disk, where it can be told to.
fn sync(folder: &Path) -> Result<()> {
    if cfg!(unix) {
        let failed = |e: std::io::Error| file_error("write to", path_text(folder), &e);
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed)?;
    }
    Ok(())
}

/// Before anything is written: whether the folder may be written to.
fn refuse_other(folder: &Path, journal: &Path, existing: Existing) -> Result<()> {
    if fs::symlink_metadata(folder).is_err() {
        return Ok(());
    }
    let entries = folder.read_dir().map_err(|e| file_error("write to", path_text(folder), &e))?;
    let others = entries.flatten().any(|entry| entry.file_name() != STATE);
    let begun = journal.is_file();
    match (begun, others, existing) {
        (true, _, Existing::Refuse) => {
            let message = "a conversion was interrupted there: resume it, or overwrite it";
            Err(Error::file("write to", path_text(folder), message))
        }
        (false, true, Existing::Refuse) => {
            Err(Error::file("write to", path_text(folder), "there is something in it already"))
        }
        (false, true, _) => {
            Err(Error::file("resume in", path_text(folder), "no interrupted conversion, but something else in it"))
        }
        _ => Ok(()),
    }
}

/// A file that has no name yet.
pub(super) struct Partial {
    file: File,
    path: PathBuf,
}

impl Partial {
    fn write(&mut self, data: &[u8]) -> Result<()> {
        self.file.write_all(data).map_err(|e| file_error("write", path_text(&self.path), &e))
    }

    fn write_at(&mut self, at: u64, data: &[u8]) -> Result<()> {
        let seek = self.file.seek(SeekFrom::Start(at));
        seek.map_err(|e| file_error("write", path_text(&self.path), &e))?;
        self.write(data)
    }
}

/// The order of tensors in a file: wide elements first, so that each is aligned; texts last, so that the size of one moves no other.
fn order(outputs: &[&Output]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..outputs.len()).collect();
    order.sort_by_key(|&i| {
        let output = outputs[i];
        (output.text, usize::MAX - if output.text { 0 } else { output.dtype.bitsize() })
    });
    // An empty tensor has the offset of its neighbour: it has to come before it for the order to be that of the offsets.
    order.sort_by_key(|&i| outputs[i].bytes() != 0 || outputs[i].text);
    order
}

/// A safetensors file that is being filled. Its tensors come in any order, and go straight to their places.
pub(super) struct Shard {
    partial: Partial,
    /// In the order of the outputs; `start` and `end` are as if each text had its largest size.
    entries: Vec<Entry>,
    order: Vec<usize>,
    written: Vec<u64>,
    texts: Vec<Option<Vec<u8>>>,
    /// Bytes that are kept free for the header.
    header: usize,
}

impl Shard {
    fn new(partial: Partial, outputs: &[&Output]) -> Self {
        let order = order(outputs);
        let mut entries: Vec<Entry> = outputs
            .iter()
            .map(|o| Entry { name: o.name.clone(), dtype: o.dtype, shape: o.shape.clone(), start: 0, end: o.bytes() })
            .collect();
        place(&mut entries, &order);
        let header = header::to_text(order.iter().map(|&i| &entries[i]), None).len().next_multiple_of(8);
        let texts = outputs.iter().map(|o| o.text.then(Vec::new)).collect();
        Self { partial, written: vec![0; entries.len()], entries, order, texts, header }
    }

    fn data(&self) -> u64 {
        LENGTH_BYTES + self.header as u64
    }

    /// Writes the next bytes of a tensor.
    pub(super) fn append(&mut self, output: usize, bytes: &[u8]) -> Result<()> {
        let entry = &self.entries[output];
        let at = entry.start + self.written[output];
        assert!(at + bytes.len() as u64 <= entry.end, "more bytes than `{}` has", entry.name);
        self.written[output] += bytes.len() as u64;
        match &mut self.texts[output] {
            Some(text) => {
                text.extend_from_slice(bytes);
                Ok(())
            }
            None => self.partial.write_at(self.data() + at, bytes),
        }
    }

    /// Writes texts and header. Gives back the file and the bytes of its tensors.
    pub(super) fn close(mut self) -> Result<(Partial, u64)> {
        for i in 0..self.entries.len() {
            let (entry, written) = (&mut self.entries[i], self.written[i]);
            if self.texts[i].is_some() {
                entry.shape = vec![written as usize];
                (entry.start, entry.end) = (0, written);
            } else {
                assert!(entry.bytes() == written, "`{}` has {written} bytes of {}", entry.name, entry.bytes());
            }
        }
        place(&mut self.entries, &self.order);
        let data = self.data();
        for (entry, text) in self.entries.iter().zip(&self.texts) {
            if let Some(text) = text {
                self.partial.write_at(data + entry.start, text)?;
            }
        }
        let total = self.order.last().map_or(0, |&i| self.entries[i].end);
        let header = header::to_text(self.order.iter().map(|&i| &self.entries[i]), Some(self.header));
        let mut start = (self.header as u64).to_le_bytes().to_vec();
        start.extend(header.as_bytes());
        self.partial.write_at(0, &start)?;
        Ok((self.partial, total))
    }
}

/// Gives the tensors their offsets, one after another; their sizes are in `end - start`.
fn place(entries: &mut [Entry], order: &[usize]) {
    let mut at = 0;
    for &i in order {
        let bytes = entries[i].bytes();
        (entries[i].start, entries[i].end) = (at, at + bytes);
        at += bytes;
    }
}
