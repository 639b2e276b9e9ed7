//! CRC-32C, the checksum of everything that travels.

use crc_fast::{CrcAlgorithm, Digest};

/// Of all bytes at once.
pub(crate) fn checksum(bytes: &[u8]) -> u32 {
    narrow(crc_fast::checksum(CrcAlgorithm::Crc32Iscsi, bytes))
}

/// Of bytes that come piece by piece.
#[derive(Debug)]
pub(crate) struct Checksum(Digest);

impl Checksum {
    pub(crate) fn new() -> Self {
        Self(Digest::new(CrcAlgorithm::Crc32Iscsi))
    }

    pub(crate) fn add(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(crate) fn value(&self) -> u32 {
        narrow(self.0.finalize())
    }
}

/// The library returns 32 bits in 64.
fn narrow(crc: u64) -> u32 {
    u32::try_from(crc).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_the_castagnoli_one_in_one_piece_and_in_many() {
        assert_eq!(checksum(b"123456789"), 0xe306_9283);
        let mut pieces = Checksum::new();
        for piece in [&b"1234"[..], b"", b"56789"] {
            pieces.add(piece);
        }
        assert_eq!(pieces.value(), 0xe306_9283);
    }
}
