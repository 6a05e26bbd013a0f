//! Files that are written completely or not at all.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::FileError;

/// Number of files created by this process. It gives two writers of one path different temporary
/// files.
static CREATED: AtomicU64 = AtomicU64::new(0);

/// A temporary file beside its target. [`NewFile::commit`] renames it to the target; dropping it
/// deletes it.
#[derive(Debug)]
pub struct NewFile {
    /// Writer for the content. It may seek.
    pub out: BufWriter<File>,
    partial: PathBuf,
    path: PathBuf,
}

impl NewFile {
    /// Creates the temporary file for the target `path`.
    ///
    /// # Errors
    /// The folder cannot be written to.
    pub fn create(path: &Path) -> Result<Self, FileError> {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        let number = CREATED.fetch_add(1, Ordering::Relaxed);
        name.push(format!(".{}-{number}.partial", std::process::id()));
        let partial = path.with_file_name(name);
        let file = File::create(&partial).map_err(|e| FileError::io("write", path, e))?;
        Ok(Self { out: BufWriter::with_capacity(1 << 20, file), partial, path: path.to_owned() })
    }

    /// Writes all data to the disk and renames the file to its target.
    ///
    /// # Errors
    /// The disk is full, or the target cannot be replaced.
    pub fn commit(mut self) -> Result<(), FileError> {
        let flushed = self.out.flush().and_then(|()| self.out.get_ref().sync_all());
        let renamed = flushed.and_then(|()| fs::rename(&self.partial, &self.path));
        renamed.map_err(|e| FileError::io("write", &self.path, e))
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        // After a commit the file no longer exists. `drop` cannot report a failure to remove it.
        drop(fs::remove_file(&self.partial));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_given_up_leaves_the_old_one_and_no_rest() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        for (content, commit) in [(b"old", true), (b"new", false)] {
            let mut file = NewFile::create(&path).unwrap();
            file.out.write_all(content).unwrap();
            if commit {
                file.commit().unwrap();
            }
            assert_eq!(fs::read(&path).unwrap(), b"old");
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn of_two_writers_the_last_to_finish_wins_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let (mut first, mut second) = (NewFile::create(&path).unwrap(), NewFile::create(&path).unwrap());
        second.out.write_all(b"second").unwrap();
        first.out.write_all(b"first").unwrap();
        second.commit().unwrap();
        first.commit().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"first");
    }
}
