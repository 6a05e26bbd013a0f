//! Sizes, rectangles and views of images: the values that sources, transforms and batches exchange.

/// The largest image that is decoded or made by resizing, in pixels (8192 x 8192). It bounds the memory that a hostile
/// header can make one thread allocate.
pub const MAX_PIXELS: usize = 1 << 26;

/// Height and width.
pub type Size = (usize, usize);

/// One image in memory: `height * width * 3` bytes, rows first, channels last.
#[derive(Clone, Copy, Debug)]
pub struct ImageView<'a> {
    /// The bytes.
    pub rgb: &'a [u8],
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

/// A rectangle of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// First row.
    pub top: usize,
    /// First column.
    pub left: usize,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

/// Where the output lies in the image. Outside the image, the output is zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Window {
    /// Row of the image shown in the output's first row.
    pub top: isize,
    /// Column of the image shown at the window's left edge.
    pub left: isize,
    /// Left and right exchanged.
    pub mirrored: bool,
}

/// How an image fills an output: a part of the image is resized first, if at all, and a window of the result is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// The part that is resized, and to what size.
    pub resized: Option<(Part, Size)>,
    /// What the output shows of the result.
    pub window: Window,
}

impl View {
    /// The number of rows, from the first, that a view of an image of size `image` needs.
    #[must_use]
    pub fn bottom(&self, image: Size) -> usize {
        self.resized.map_or(image.0, |(part, _)| part.top + part.height)
    }

    /// Refuses a view that resizes to more than [`MAX_PIXELS`], as an image of one row and many columns would be.
    ///
    /// # Errors
    /// The size that is too large.
    pub fn check(&self) -> Result<(), String> {
        match self.resized {
            Some((_, (height, width))) if height.saturating_mul(width) > MAX_PIXELS => {
                Err(format!("it would be resized to {height} x {width}, more than {MAX_PIXELS} pixels"))
            }
            _ => Ok(()),
        }
    }
}
