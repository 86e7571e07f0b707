//! The columns of an encoded row: a number of columns in 2 bytes, then for each column its length in 4 bytes and its value; the length -1 is
//! NULL.

use fleetwright_api::pipeline::OnConflict;

/// The bytes of the length of a column.
const LENGTH_BYTES: usize = 4;

/// The length of an `integer`.
const INTEGER_BYTES: u32 = 4;

/// The bytes of the number of columns.
const COUNT_BYTES: usize = 2;

/// The bytes of the number of columns, of the time and of the device.
const TIME_AND_DEVICE_BYTES: usize = COUNT_BYTES + LENGTH_BYTES + 8 + LENGTH_BYTES + 4;

/// The encoded columns of a row, each with its length.
pub fn columns(row: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = row.get(COUNT_BYTES..).unwrap_or_default();
    std::iter::from_fn(move || {
        let (column, after) = rest.split_at_checked(size(rest)?)?;
        rest = after;
        Some(column)
    })
}

/// The size of the first column, with its length.
fn size(rest: &[u8]) -> Option<usize> {
    let length = i32::from_be_bytes(*rest.first_chunk()?);
    Some(LENGTH_BYTES + usize::try_from(length).unwrap_or(0))
}

/// The first `count` columns after time and device.
pub fn key(row: &[u8], count: usize) -> &[u8] {
    let rest = row.get(TIME_AND_DEVICE_BYTES..).unwrap_or_default();
    let end = (0..count).try_fold(0, |end, _| Some(end + size(rest.get(end..)?)?));
    end.and_then(|end| rest.get(..end)).unwrap_or_default()
}

/// Appends the row with an additional last column of the type `integer`.
pub fn append_integer(piece: &mut Vec<u8>, row: &[u8], integer: i32) {
    let (count, columns) = row.split_at(COUNT_BYTES.min(row.len()));
    let count = count.first_chunk().map_or(0, |count| u16::from_be_bytes(*count));
    piece.extend_from_slice(&(count + 1).to_be_bytes());
    piece.extend_from_slice(columns);
    piece.extend_from_slice(&INTEGER_BYTES.to_be_bytes());
    piece.extend_from_slice(&integer.to_be_bytes());
}

/// Two rows with the same key as one.
#[derive(Debug, Eq, PartialEq)]
pub struct Combined {
    /// Whether a column has different values in the two rows.
    pub has_conflict: bool,
    /// The encoded row, if it is not the earlier one.
    pub changed: Option<Vec<u8>>,
}

/// Fills the NULL columns of the earlier row with the values of the later one.
pub fn combine<'r>(earlier: impl Iterator<Item = &'r [u8]>, later: impl Iterator<Item = &'r [u8]>, on_conflict: OnConflict) -> Combined {
    let (mut has_conflict, mut is_changed, mut count) = (false, false, 0_u16);
    let mut bytes = vec![0; COUNT_BYTES];
    for (one, other) in earlier.zip(later) {
        let conflicts = one != other && !is_null(one) && !is_null(other);
        has_conflict |= conflicts;
        let takes_later = one != other && (is_null(one) || (conflicts && on_conflict == OnConflict::Replace));
        is_changed |= takes_later;
        bytes.extend_from_slice(if takes_later { other } else { one });
        count += 1;
    }
    bytes[..COUNT_BYTES].copy_from_slice(&count.to_be_bytes());
    Combined { has_conflict, changed: is_changed.then_some(bytes) }
}

fn is_null(column: &[u8]) -> bool {
    column.len() == LENGTH_BYTES && column == (-1_i32).to_be_bytes()
}
