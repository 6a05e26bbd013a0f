//! Where images come from: something that lends RGB bytes by row.

use crate::error::{Error, Result};

/// One image: `height * width * 3` bytes, rows first, channels last.
#[derive(Clone, Copy, Debug)]
pub struct ImageView<'a> {
    /// The bytes.
    pub rgb: &'a [u8],
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

/// Images reachable by row from several threads at once.
pub trait Source: Sync {
    /// How many images there are.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Lends image `row`.
    ///
    /// # Errors
    /// A row that is not there.
    fn image(&self, row: usize) -> Result<ImageView<'_>>;
}

/// Images of one size, side by side in memory: `[num, height, width, 3]`.
#[derive(Clone, Copy, Debug)]
pub struct Pixels<'a> {
    rgb: &'a [u8],
    height: usize,
    width: usize,
}

impl<'a> Pixels<'a> {
    /// Sees `rgb` as images of `height * width * 3` bytes.
    ///
    /// # Errors
    /// Bytes that are not a whole number of such images.
    pub fn new(rgb: &'a [u8], height: usize, width: usize) -> Result<Self> {
        let bytes = height * width * 3;
        if bytes == 0 || !rgb.len().is_multiple_of(bytes) {
            let message =
                format!("expected whole {height}x{width} RGB images ({bytes} bytes), got {} bytes", rgb.len());
            return Err(Error::Argument(message));
        }
        Ok(Self { rgb, height, width })
    }
}

impl Source for Pixels<'_> {
    fn len(&self) -> usize {
        self.rgb.len() / (self.height * self.width * 3)
    }

    fn image(&self, row: usize) -> Result<ImageView<'_>> {
        let bytes = self.height * self.width * 3;
        let rgb = row.checked_mul(bytes).and_then(|start| self.rgb.get(start..)?.get(..bytes));
        let rgb = rgb.ok_or(Error::Row { row: row as i64, len: self.len() })?;
        Ok(ImageView { rgb, height: self.height, width: self.width })
    }
}
