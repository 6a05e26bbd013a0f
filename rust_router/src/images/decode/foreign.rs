//! Names files that are neither JPEG nor PNG by their first bytes, for messages.

/// First bytes of other formats.
const SIGNATURES: [(&[u8], &str); 7] = [
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"\xFF\x0A", "JPEG XL"),
    (b"\0\0\0\x0CJXL ", "JPEG XL"),
    (b"%PDF", "PDF"),
];

/// Brands of files that begin with a box `ftyp`.
const BRANDS: [(&[u8], &str); 6] =
    [(b"avif", "AVIF"), (b"avis", "AVIF"), (b"heic", "HEIC"), (b"heix", "HEIC"), (b"mif1", "HEIC"), (b"msf1", "HEIC")];

/// Starts of an HTML page, in lower case.
const HTML: [&[u8]; 2] = [b"<!doctype html", b"<html"];

/// Number of first bytes in which an HTML page starts, after blanks and a byte order mark.
const HEAD: usize = 64;

/// What bytes that are neither JPEG nor PNG are, and what to do with them.
pub(super) fn described(bytes: &[u8]) -> String {
    if is_html(bytes) {
        return "an HTML page, perhaps a failed download; download the image again".into();
    }
    match format(bytes) {
        Some(name) => format!("{name}; convert it to JPEG or PNG, for example with Pillow or ImageMagick"),
        None => format!("bytes that begin with {:02X?}", &bytes[..bytes.len().min(4)]),
    }
}

fn format(bytes: &[u8]) -> Option<&'static str> {
    let (start, table): (&[u8], &[(&[u8], &'static str)]) = match bytes {
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => return Some("WebP"),
        [_, _, _, _, b'f', b't', b'y', b'p', brand @ ..] => (brand, &BRANDS),
        _ => (bytes, &SIGNATURES),
    };
    table.iter().find(|(signature, _)| start.starts_with(signature)).map(|&(_, name)| name)
}

fn is_html(bytes: &[u8]) -> bool {
    let head = &bytes[..bytes.len().min(HEAD)];
    let text = head.iter().position(|byte| !b"\xEF\xBB\xBF \t\r\n".contains(byte)).map(|start| &head[start..]);
    text.is_some_and(|text| HTML.iter().any(|tag| text.to_ascii_lowercase().starts_with(tag)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_formats_are_named_by_their_first_bytes() {
        let cases: [(&[u8], &str); 10] = [
            (b"RIFF\x10\0\0\0WEBPVP8 ", "WebP"),
            (b"GIF89a", "GIF"),
            (b"BM\x36\0", "BMP"),
            (b"II*\0", "TIFF"),
            (b"MM\0*", "TIFF"),
            (b"\xFF\x0A", "JPEG XL"),
            (b"\0\0\0\x0CJXL \r\n", "JPEG XL"),
            (b"%PDF-1.7", "PDF"),
            (b"\0\0\0\x18ftypheic", "HEIC"),
            (b"\0\0\0\x1Cftypavif", "AVIF"),
        ];
        for (bytes, name) in cases {
            let remedy = "convert it to JPEG or PNG, for example with Pillow or ImageMagick";
            assert_eq!(described(bytes), format!("{name}; {remedy}"));
        }
    }

    #[test]
    fn an_html_page_is_told_after_blanks_and_in_any_case() {
        for page in [&b"<html>"[..], b"\xEF\xBB\xBF<!DOCTYPE html>", b" \r\n\t<!doctype HTML>"] {
            assert_eq!(described(page), "an HTML page, perhaps a failed download; download the image again");
        }
    }

    #[test]
    fn unknown_formats_are_told_by_their_first_four_bytes() {
        assert_eq!(described(b"RIFF\x10\0\0\0WAVE"), "bytes that begin with [52, 49, 46, 46]");
        assert_eq!(described(b"\0\0\0\x18ftypqt  "), "bytes that begin with [00, 00, 00, 18]");
        assert_eq!(described(b" \n"), "bytes that begin with [20, 0A]");
    }
}
