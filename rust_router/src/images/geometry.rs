//! Sizes, rectangles and views of images, which sources, transforms and batches exchange.

/// The largest number of pixels of a decoded or resized image (8192 x 8192). It limits the memory
/// that one thread allocates because of a malicious header.
pub const MAX_PIXELS: usize = 1 << 26;

/// Height and width in pixels.
pub type Size = (usize, usize);

/// One image in memory: `[height, width, 3]` bytes.
#[derive(Clone, Copy, Debug)]
pub struct ImageView<'a> {
    /// The bytes, `height * width * 3` of them.
    pub rgb: &'a [u8],
    /// Number of rows.
    pub height: usize,
    /// Number of columns.
    pub width: usize,
}

/// A rectangle of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// First row.
    pub top: usize,
    /// First column.
    pub left: usize,
    /// Number of rows.
    pub height: usize,
    /// Number of columns.
    pub width: usize,
}

/// The position of the output in the image. The output is zero outside the image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Window {
    /// Row of the image in the first row of the output. It may be negative.
    pub top: isize,
    /// Column of the image at the left edge of the window. It may be negative.
    pub left: isize,
    /// Whether left and right are exchanged.
    pub mirrored: bool,
}

/// The path from an image to an output: a part of the image may be resized, and a window of the
/// result is the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// The part that is resized, and its new size; `None` without resizing.
    pub resized: Option<(Part, Size)>,
    /// The position of the output in the resized part or, without resizing, in the image.
    pub window: Window,
}

impl View {
    /// The number of top rows of an image of size `image` that this view needs.
    #[must_use]
    pub fn bottom(&self, image: Size) -> usize {
        self.resized.map_or(image.0, |(part, _)| part.top + part.height)
    }

    /// Checks that the resized part has at most [`MAX_PIXELS`]. An image of one row and many
    /// columns can exceed them.
    ///
    /// # Errors
    /// The resized part would have more pixels.
    pub fn check(&self) -> Result<(), String> {
        match self.resized {
            Some((_, (height, width))) if height.saturating_mul(width) > MAX_PIXELS => {
                Err(format!("it would be resized to {height} x {width}, more than {MAX_PIXELS} pixels"))
            }
            _ => Ok(()),
        }
    }
}
