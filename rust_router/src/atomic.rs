//! Files that are written completely or not at all.

use std::fs::{self, File};
use std::io::{BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::FileError;

/// Number of the next temporary file of this process. Two writers of one path thus get different
/// files without a search.
static CREATED: AtomicU64 = AtomicU64::new(0);

/// A temporary file beside its target. [`NewFile::commit`] renames it to the target; dropping it
/// deletes it.
#[derive(Debug)]
pub struct NewFile {
    /// Writer for the content. It may seek.
    pub out: BufWriter<File>,
    partial: PathBuf,
    path: PathBuf,
    committed: bool,
}

impl NewFile {
    /// Creates the temporary file for the target `path`.
    ///
    /// # Errors
    /// The folder cannot be written to.
    pub fn create(path: &Path) -> Result<Self, FileError> {
        loop {
            let mut name = path.file_name().unwrap_or_default().to_owned();
            let number = CREATED.fetch_add(1, Ordering::Relaxed);
            name.push(format!(".{}-{number}.partial", std::process::id()));
            let partial = path.with_file_name(name);
            match File::create_new(&partial) {
                Ok(file) => {
                    let out = BufWriter::with_capacity(1 << 20, file);
                    return Ok(Self { out, partial, path: path.to_owned(), committed: false });
                }
                // Another process with this number writes the same path: two containers that share
                // a folder number their processes alike.
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(FileError::io("write", path, error)),
            }
        }
    }

    /// Writes all data to the disk and renames the file to its target.
    ///
    /// # Errors
    /// The disk is full, or the target cannot be replaced.
    pub fn commit(mut self) -> Result<(), FileError> {
        let flushed = self.out.flush().and_then(|()| self.out.get_ref().sync_all());
        let renamed = flushed.and_then(|()| fs::rename(&self.partial, &self.path));
        self.committed = renamed.is_ok();
        renamed.map_err(|e| FileError::io("write", &self.path, e))
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        // After a commit the name is free, and another process may have taken it. `drop` cannot
        // report a failure to remove the file.
        if !self.committed {
            drop(fs::remove_file(&self.partial));
        }
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

    #[test]
    fn the_temporary_file_of_another_process_with_the_same_number_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        // More files than other tests create meanwhile.
        let next = CREATED.load(Ordering::Relaxed);
        let name = |number| folder.path().join(format!("file.{}-{number}.partial", std::process::id()));
        let theirs: Vec<PathBuf> = (next..next + 100).map(name).collect();
        theirs.iter().for_each(|partial| fs::write(partial, b"theirs").unwrap());
        for commit in [true, false] {
            let mut file = NewFile::create(&path).unwrap();
            file.out.write_all(b"ours").unwrap();
            if commit {
                file.commit().unwrap();
            }
        }
        assert_eq!(fs::read(&path).unwrap(), b"ours");
        assert!(theirs.iter().all(|partial| fs::read(partial).unwrap() == b"theirs"));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 101);
    }
}
