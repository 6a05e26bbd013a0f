//! Files that are there whole or not at all.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Writes a file beside its target, flushes it to the disk, then gives it its name; on an error nothing is left.
///
/// # Errors
/// What `content` returns, or a file that cannot be written.
pub fn write<T>(path: &Path, content: impl FnOnce(&mut BufWriter<File>) -> Result<T>) -> Result<T> {
    let failed = |e| Error::io("write", path, e);
    let partial = partial_name(path);
    let written = File::create(&partial).map_err(failed).and_then(|file| {
        let mut out = BufWriter::with_capacity(1 << 20, file);
        let value = content(&mut out)?;
        out.flush().and_then(|()| out.get_ref().sync_all()).map_err(failed)?;
        Ok(value)
    });
    let finished = written.and_then(|value| fs::rename(&partial, path).map(|()| value).map_err(failed));
    if finished.is_err() {
        // The first error is the one to tell; a rest that cannot be removed either changes nothing about it.
        drop(fs::remove_file(&partial));
    }
    finished
}

fn partial_name(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.partial", std::process::id()));
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_that_fails_leaves_the_old_file_and_no_rest() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        write(&path, |out| out.write_all(b"old").map_err(|e| Error::io("write", &path, e))).unwrap();
        let failed = write(&path, |out| {
            out.write_all(b"new").unwrap();
            Err::<(), _>(Error::Stopped)
        });
        assert!(matches!(failed, Err(Error::Stopped)));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
