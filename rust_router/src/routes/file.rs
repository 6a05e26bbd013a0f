//! Route logs as files in NumPy's `.npz` format. `numpy.load` reads them without this crate.
//!
//! All arrays are little-endian and in C order, with n rows, L MoE layers and C conditions:
//!
//! | name | type | shape | meaning |
//! |---|---|---|---|
//! | `route_log_version` | int64 | `[1]` | 1 |
//! | `num_experts` | uint16 | `[L]` | experts of each MoE layer |
//! | `condition_names` | str | `[C]` | names of the conditions |
//! | `condition` | uint16 | `[n]` | row of `condition_names` |
//! | `epoch` | uint32 | `[n]` | epoch of training; 0 outside training |
//! | `index` | int64 | `[n]` | sample index |
//! | `label`, `prediction` | int32 | `[n]` | classes; -1 if unknown |
//! | `expert` | uint8 | `[n, L]` | expert that each layer chose |
//!
//! Rows are sorted by (condition, epoch, index), so equal logs give equal files.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, Write};
use std::path::Path;

use zip::result::ZipError;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

use crate::atomic::NewFile;
use crate::error::FileError;
use crate::routes::error::Result;
use crate::routes::key::{Key, MAX_CONDITION};
use crate::routes::log::{RouteLog, Rows};

const VERSION: i64 = 1;

/// Writes a log. The file appears complete or not at all.
///
/// # Errors
/// The file cannot be written.
pub fn save(log: &mut RouteLog, path: &Path) -> Result<()> {
    let mut file = NewFile::create(path)?;
    write(log, &mut file.out).map_err(|e| FileError::io("write", path, e))?;
    Ok(file.commit()?)
}

/// Reads a log written by [`save`] or by `numpy.savez`.
///
/// # Errors
/// The file is missing, is not a route log, or contains impossible rows.
pub fn load(path: &Path) -> Result<RouteLog> {
    let file = File::open(path).map_err(|e| FileError::io("read", path, e))?;
    let log = read(BufReader::new(file));
    Ok(log.map_err(|reason| FileError::Format { what: "route log", path: path.to_owned(), reason })?)
}

fn write(log: &mut RouteLog, out: impl Write + Seek) -> io::Result<()> {
    let num_layers = log.num_experts().len();
    let num_experts: Vec<u8> = log.num_experts().iter().flat_map(|n| n.to_le_bytes()).collect();
    let mut names: Vec<String> = log.keys().map(|key| key.condition.clone()).collect();
    names.dedup(); // keys come in order
    if names.len() > 1 << 16 {
        return Err(io::Error::other(format!("expected at most 65536 conditions, got {}", names.len())));
    }
    let name_of = |key: &Key| names.partition_point(|name| *name < key.condition) as u16;
    let width = names.iter().map(|name| name.chars().count()).max().unwrap_or(0).max(1);
    let utf32 = names.iter().flat_map(|name| name.chars().map(u32::from).chain(std::iter::repeat(0)).take(width));
    let utf32: Vec<u8> = utf32.flat_map(u32::to_le_bytes).collect();
    let tables: Vec<_> = log.tables().collect();
    let n: usize = tables.iter().map(|(_, table)| table.len()).sum();

    let mut npz = ZipWriter::new(out);
    let options = SimpleFileOptions::default()
        .compression_method(CompressionMethod::Deflated)
        .compression_level(Some(1))
        .large_file(true) // a column may be larger than 4 GiB; numpy.savez writes all of them so
        .last_modified_time(zip::DateTime::default());
    let mut column =
        |name: &str, descr: &str, shape: &str, data: &mut dyn Iterator<Item = Vec<u8>>| -> io::Result<()> {
            npz.start_file(format!("{name}.npy"), options)?;
            npz.write_all(&header(descr, shape))?;
            for bytes in data {
                npz.write_all(&bytes)?;
            }
            Ok(())
        };
    column("route_log_version", "<i8", "(1,)", &mut [VERSION.to_le_bytes().to_vec()].into_iter())?;
    column("num_experts", "<u2", &format!("({num_layers},)"), &mut [num_experts].into_iter())?;
    column("condition_names", &format!("<U{width}"), &format!("({},)", names.len()), &mut [utf32].into_iter())?;
    let rows = &format!("({n},)");
    let mut conditions = tables.iter().map(|(key, table)| name_of(key).to_le_bytes().repeat(table.len()));
    column("condition", "<u2", rows, &mut conditions)?;
    column("epoch", "<u4", rows, &mut tables.iter().map(|(key, table)| key.epoch.to_le_bytes().repeat(table.len())))?;
    let mut indices = tables.iter().map(|(_, t)| t.rows().indices.iter().flat_map(|v| v.to_le_bytes()).collect());
    column("index", "<i8", rows, &mut indices)?;
    let mut labels = tables.iter().map(|(_, t)| t.rows().labels.iter().flat_map(|v| v.to_le_bytes()).collect());
    column("label", "<i4", rows, &mut labels)?;
    let mut predictions =
        tables.iter().map(|(_, t)| t.rows().predictions.iter().flat_map(|v| v.to_le_bytes()).collect());
    column("prediction", "<i4", rows, &mut predictions)?;
    let mut experts = tables.iter().map(|(_, table)| table.rows().experts.to_vec());
    column("expert", "|u1", &format!("({n}, {num_layers})"), &mut experts)?;
    npz.finish()?.flush()
}

/// The header of an `.npy` file, version 1.0, padded so that the data start at a multiple of 64
/// bytes.
fn header(descr: &str, shape: &str) -> Vec<u8> {
    let mut dict = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
    let unpadded = 10 + dict.len() + 1;
    dict.push_str(&" ".repeat(unpadded.next_multiple_of(64) - unpadded));
    dict.push('\n');
    [&b"\x93NUMPY\x01\x00"[..], &(dict.len() as u16).to_le_bytes(), dict.as_bytes()].concat()
}

/// Reads a log from any reader. The used memory is at most a small multiple of the unpacked size.
///
/// # Errors
/// The bytes are not a route log. The error is the reason.
pub fn read(bytes: impl Read + Seek) -> std::result::Result<RouteLog, String> {
    let mut npz = ZipArchive::new(bytes).map_err(|e| e.to_string())?;
    let mut column = |name: &str, descr: &str| -> std::result::Result<Array, String> {
        let member = npz.by_name(&format!("{name}.npy")).map_err(|error| match error {
            ZipError::FileNotFound => format!("there is no array {name:?}"),
            ZipError::UnsupportedArchive(ZipError::PASSWORD_REQUIRED) => format!("array {name:?} is encrypted"),
            error => format!("array {name:?}: {error}"),
        })?;
        Array::read(member, descr).map_err(|reason| format!("array {name:?}: {reason}"))
    };
    let version = column("route_log_version", "<i8")?.i64();
    if version != [VERSION] {
        return Err(format!("expected version {VERSION}, got {version:?}"));
    }
    let num_experts = column("num_experts", "<u2")?.u16();
    let names = column("condition_names", "<U")?.strings()?;
    let conditions = column("condition", "<u2")?.u16();
    let n = conditions.len();
    let epochs: Vec<u32> = column("epoch", "<u4")?.i32().into_iter().map(i32::cast_unsigned).collect();
    let indices = column("index", "<i8")?.i64();
    let labels = column("label", "<i4")?.i32();
    let predictions = column("prediction", "<i4")?.i32();
    let experts = column("expert", "|u1")?;
    let num_layers = num_experts.len();
    if experts.shape != [n, num_layers] {
        return Err(format!("expected experts [{n}, {num_layers}], got {:?}", experts.shape));
    }
    if [epochs.len(), indices.len(), labels.len(), predictions.len()] != [n; 4] {
        return Err("its columns have different lengths".into());
    }
    let mut log = RouteLog::new(num_experts).map_err(|e| e.to_string())?;
    let mut start = 0;
    while start < n {
        let run = (start..n).take_while(|&row| (conditions[row], epochs[row]) == (conditions[start], epochs[start]));
        let end = start + run.count();
        let condition = names.get(usize::from(conditions[start])).ok_or("a row of a condition without a name")?.clone();
        let rows = Rows {
            indices: &indices[start..end],
            experts: &experts.bytes[start * num_layers..end * num_layers],
            labels: &labels[start..end],
            predictions: &predictions[start..end],
        };
        log.append(Key { condition, epoch: epochs[start] }, rows).map_err(|e| e.to_string())?;
        start = end;
    }
    Ok(log)
}

/// The content of an `.npy` file.
struct Array {
    shape: Vec<usize>,
    item_size: usize,
    bytes: Vec<u8>,
}

impl Array {
    /// Reads an array of type `descr`. For strings, `descr` is `<U`, and the file adds their
    /// length.
    fn read(mut file: impl Read, descr: &str) -> std::result::Result<Self, String> {
        let mut start = [0; 10];
        file.read_exact(&mut start).map_err(|e| e.to_string())?;
        let Some(length) = start.strip_prefix(b"\x93NUMPY\x01\x00") else {
            return Err("expected an .npy array, version 1.0".into());
        };
        let mut dict = vec![0; usize::from(length[0]) | usize::from(length[1]) << 8];
        file.read_exact(&mut dict).map_err(|e| e.to_string())?;
        let dict = String::from_utf8(dict).map_err(|e| e.to_string())?;
        let (item_size, shape) = parse_header(&dict, descr).ok_or_else(|| {
            format!("expected type {descr} in C order, got {:?}", dict.trim_end().chars().take(120).collect::<String>())
        })?;
        let size = shape.iter().try_fold(item_size, |size, &n| size.checked_mul(n)).ok_or("its shape is too large")?;
        // The vector grows with the bytes that are read, and not with the size in the header.
        let mut bytes = Vec::new();
        file.take((size as u64).saturating_add(1)).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
        if bytes.len() != size {
            return Err(format!("expected {size} bytes for shape {shape:?}, got {} or more", bytes.len()));
        }
        Ok(Self { shape, item_size, bytes })
    }

    fn i64(&self) -> Vec<i64> {
        self.bytes.as_chunks().0.iter().map(|&b| i64::from_le_bytes(b)).collect()
    }

    fn i32(&self) -> Vec<i32> {
        self.bytes.as_chunks().0.iter().map(|&b| i32::from_le_bytes(b)).collect()
    }

    fn u16(&self) -> Vec<u16> {
        self.bytes.as_chunks().0.iter().map(|&b| u16::from_le_bytes(b)).collect()
    }

    fn strings(&self) -> std::result::Result<Vec<String>, String> {
        let text = |item: &[u8]| {
            let codes = item.as_chunks().0.iter().map(|&b| u32::from_le_bytes(b)).take_while(|&code| code != 0);
            codes.map(char::from_u32).collect::<Option<String>>().ok_or_else(|| "text that is not Unicode".to_owned())
        };
        self.bytes.chunks_exact(self.item_size).map(text).collect()
    }
}

/// Bytes per item and shape; `None` if the array is not in C order or has another type.
fn parse_header(dict: &str, descr: &str) -> Option<(usize, Vec<usize>)> {
    let value = |key: &str| Some(dict.split_once(&format!("'{key}':"))?.1.trim_start());
    if !value("fortran_order")?.starts_with("False") {
        return None;
    }
    let found = value("descr")?.strip_prefix('\'')?.split_once('\'')?.0;
    let item_size = if descr == "<U" {
        let length: usize = found.strip_prefix(descr)?.parse().ok()?;
        4 * Some(length).filter(|length| (1..=MAX_CONDITION).contains(length))?
    } else {
        if found != descr {
            return None;
        }
        descr[2..].parse().ok()?
    };
    let shape = value("shape")?.strip_prefix('(')?.split_once(')')?.0;
    let shape = shape.split(',').map(str::trim).filter(|n| !n.is_empty()).map(str::parse);
    Some((item_size, shape.collect::<std::result::Result<_, _>>().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    fn log() -> RouteLog {
        let mut log = RouteLog::new(vec![2, 3]).unwrap();
        for (condition, epoch) in [("clean", 0), ("clean", 7), ("PGD-50 ε=8/255", 0)] {
            let rows = Rows { indices: &[5, 1], experts: &[0, 2, 1, 0], labels: &[3, -1], predictions: &[-1, 2] };
            log.append(Key { condition: condition.into(), epoch }, rows).unwrap();
        }
        log.sort();
        log
    }

    fn bytes(mut log: RouteLog) -> Vec<u8> {
        let mut out = Cursor::new(Vec::new());
        write(&mut log, &mut out).unwrap();
        out.into_inner()
    }

    #[test]
    fn what_was_saved_is_loaded() {
        assert_eq!(read(Cursor::new(bytes(log()))).unwrap(), log());
        let empty = RouteLog::new(vec![]).unwrap();
        assert_eq!(read(Cursor::new(bytes(empty.clone()))).unwrap(), empty);
    }

    #[test]
    fn every_column_may_grow_beyond_4_gib() {
        let whole = bytes(log());
        let local: Vec<usize> = (0..whole.len() - 4).filter(|&at| whole[at..].starts_with(b"PK\x03\x04")).collect();
        assert_eq!(local.len(), 9);
        for at in local {
            let number = |place: usize| usize::from(u16::from_le_bytes([whole[at + place], whole[at + place + 1]]));
            let extra = at + 30 + number(26);
            assert!(number(28) >= 4, "there is an extra field");
            assert_eq!(whole[extra..extra + 2], 1_u16.to_le_bytes(), "with sizes of 64 bits");
        }
    }

    #[test]
    fn a_file_cut_or_changed_anywhere_is_refused_or_harmless() {
        let whole = bytes(log());
        for end in 0..whole.len() {
            assert!(read(Cursor::new(&whole[..end])).is_err(), "cut at {end}");
        }
        for place in 0..whole.len() {
            let mut changed = whole.clone();
            changed[place] ^= 0x11;
            drop(read(Cursor::new(changed))); // must not panic
        }
    }

    #[test]
    fn an_array_that_cannot_be_unpacked_is_not_called_missing() {
        // In the zip's directory, bit 0 of byte 8 is encryption, and byte 10 is the method.
        for (field, value, message) in [
            (8, 1, "array \"route_log_version\" is encrypted"),
            (10, 12, "array \"route_log_version\": compression method not supported: 12"),
        ] {
            let mut changed = bytes(log());
            let entry = changed.windows(4).position(|signature| signature == b"PK\x01\x02").unwrap();
            changed[entry + field] = value;
            assert_eq!(read(Cursor::new(changed)).unwrap_err(), message);
        }
        let empty = Cursor::new(b"PK\x05\x06\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
        assert_eq!(read(empty).unwrap_err(), "there is no array \"route_log_version\"");
    }

    #[test]
    fn a_header_that_promises_more_than_there_is_costs_nothing() {
        let mut file = header("<i8", "(1099511627776,)");
        file.extend([0; 8]);
        let Err(message) = Array::read(&file[..], "<i8") else { panic!("read") };
        assert_eq!(message, "expected 8796093022208 bytes for shape [1099511627776], got 8 or more");
        assert!(Array::read(&header("<i8", "(99999999999, 99999999999)")[..], "<i8").is_err());
    }

    #[test]
    fn a_missing_file_is_named() {
        let message = load(Path::new("/nowhere/routes.npz")).unwrap_err().to_string();
        assert!(message.starts_with("cannot read /nowhere/routes.npz: "), "{message}");
    }
}
