//! Tar shards in the WebDataset layout: where each sample's image lies, and its label, without unpacking anything.
//!
//! The members of one sample share a name up to the first dot of its last part; `jpg`, `jpeg` or `png` holds the image
//! and `cls` the label, as a decimal number. Other members are passed over.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use crate::error::{Error, Result};

/// One sample of a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Its name, without the members' endings.
    pub name: String,
    /// First byte of its image in the shard.
    pub offset: u64,
    /// Bytes of its image.
    pub length: u64,
    /// Its label.
    pub label: i64,
}

/// The samples of an uncompressed shard, in order of their images.
///
/// # Errors
/// A file that is not there or not a tar archive, is cut, or holds an image without label or with two.
pub fn open(path: &Path) -> Result<Vec<Sample>> {
    let file = File::open(path).map_err(|e| Error::io("read", path, e))?;
    read(BufReader::new(file)).map_err(|reason| Error::Format { what: "tar shard", path: path.to_owned(), reason })
}

/// [`open`] for anything that holds a file's bytes; an error is the reason why it is no shard.
///
/// # Errors
/// Anything but a whole archive of labelled images. Memory stays within a small multiple of the bytes' length.
pub fn read(mut file: impl Read + Seek) -> std::result::Result<Vec<Sample>, String> {
    /// Longest label: the digits of an i64, a sign and a line's end.
    const MAX_LABEL: u64 = 24;
    let end = file.seek(SeekFrom::End(0)).and_then(|end| file.rewind().map(|()| end)).map_err(|e| e.to_string())?;
    let mut images: Vec<Sample> = Vec::new();
    let mut labels = BTreeMap::new();
    let mut archive = tar::Archive::new(file);
    for entry in archive.entries_with_seek().map_err(|e| e.to_string())? {
        let mut entry = entry.map_err(|e| e.to_string())?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let (offset, length) = (entry.raw_file_position(), entry.size());
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        if offset.checked_add(length).is_none_or(|last| last > end) {
            return Err(format!("it is cut within {path:?}"));
        }
        let base = path.rfind('/').map_or(0, |slash| slash + 1);
        let Some((name, ending)) = path[base..].split_once('.').map(|(_, ending)| {
            let name = &path[..path.len() - ending.len() - 1];
            (name.to_owned(), ending.to_ascii_lowercase())
        }) else {
            continue;
        };
        match ending.as_str() {
            "jpg" | "jpeg" | "png" if length == 0 => return Err(format!("image {path:?} is empty")),
            "jpg" | "jpeg" | "png" => images.push(Sample { name, offset, length, label: 0 }),
            "cls" if length <= MAX_LABEL => {
                let mut text = String::new();
                entry.read_to_string(&mut text).map_err(|e| e.to_string())?;
                let label: i64 = text.trim().parse().map_err(|e| format!("label {path:?}: {e}"))?;
                labels.insert(name, label);
            }
            "cls" => return Err(format!("label {path:?} has {length} bytes; expected a decimal number")),
            _ => {}
        }
    }
    if images.is_empty() {
        return Err("it holds no jpg, jpeg or png".into());
    }
    for image in &mut images {
        let label = labels.remove(&image.name);
        image.label = label.ok_or_else(|| format!("expected one {0}.cls for one image {0}", image.name))?;
    }
    Ok(images)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    fn shard(members: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, data) in members {
            let mut header = tar::Header::new_gnu();
            header.set_size(data.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, name, *data).unwrap();
        }
        builder.into_inner().unwrap()
    }

    #[test]
    fn samples_are_found_where_they_lie() {
        let long = format!("{}/b.x", "folder.d".repeat(20));
        let (long_image, long_label) = (format!("{long}.JPEG"), format!("{long}.cls"));
        let bytes = shard(&[
            ("000.cls", b"7\n"),
            ("000.jpg", b"image"),
            ("000.json", b"{}"),
            (&long_image.replace("b.x", "b"), b"other image"),
            (&long_label.replace("b.x", "b"), b"12"),
        ]);
        let samples = read(Cursor::new(&bytes)).unwrap();
        let found = |s: &Sample| &bytes[s.offset as usize..][..s.length as usize];
        assert_eq!(samples.iter().map(|s| s.label).collect::<Vec<_>>(), [7, 12]);
        assert_eq!((found(&samples[0]), found(&samples[1])), (&b"image"[..], &b"other image"[..]));
        assert_eq!(samples[0].name, "000");
    }

    #[test]
    fn a_shard_that_is_cut_or_lacks_a_label_is_refused() {
        let reason = |bytes: &[u8]| read(Cursor::new(bytes)).unwrap_err();
        assert_eq!(reason(&shard(&[("a.jpg", b"x")])), "expected one a.cls for one image a");
        assert_eq!(
            reason(&shard(&[("a.jpg", b"x"), ("a.png", b"y"), ("a.cls", b"1")])),
            "expected one a.cls for one image a"
        );
        assert!(reason(&shard(&[("a.jpg", b"x"), ("a.cls", b"cat")])).starts_with("label \"a.cls\": invalid digit"));
        assert_eq!(reason(&shard(&[("notes.txt", b"x")])), "it holds no jpg, jpeg or png");
        assert_eq!(reason(&shard(&[("a.jpg", b"")])), "image \"a.jpg\" is empty");
        assert_eq!(reason(b""), "it holds no jpg, jpeg or png");
        let whole = shard(&[("a.cls", b"1"), ("a.jpg", &[7; 600])]);
        assert_eq!(reason(&whole[..3 * 512 + 100]), "it is cut within \"a.jpg\"");
        assert!(reason(&[7; 1024]).contains("checksum") || !reason(&[7; 1024]).is_empty());
    }
}
