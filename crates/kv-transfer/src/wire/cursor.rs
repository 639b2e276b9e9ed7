//! Reading little-endian fields off a slice. Never panics; knows the name of what it reads for the error.

use super::WireError;

pub(super) struct Cursor<'a> {
    what: &'static str,
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    pub(super) fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { what, rest: bytes }
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (head, rest) = self
            .rest
            .split_first_chunk()
            .ok_or(WireError::Truncated { what: self.what })?;
        self.rest = rest;
        Ok(*head)
    }

    pub(super) fn u8(&mut self) -> Result<u8, WireError> {
        self.array::<1>().map(|[b]| b)
    }

    pub(super) fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_le_bytes)
    }

    /// A `u32` count, then as many bytes.
    pub(super) fn bytes(&mut self) -> Result<&'a [u8], WireError> {
        let n = self.u32()? as usize;
        let (head, rest) = self
            .rest
            .split_at_checked(n)
            .ok_or(WireError::Truncated { what: self.what })?;
        self.rest = rest;
        Ok(head)
    }

    /// A `u32` count, then as many entries of `N` bytes; the count is held against the bytes that are there
    /// before anything is allocated.
    pub(super) fn list<const N: usize>(&mut self) -> Result<&'a [[u8; N]], WireError> {
        let n = self.u32()? as usize;
        let (entries, rest) = self.rest.as_chunks();
        match entries.split_at_checked(n) {
            Some((head, [])) => {
                self.rest = rest;
                Ok(head)
            }
            Some(_) => Err(WireError::Trailing { what: self.what }),
            None => Err(WireError::Truncated { what: self.what }),
        }
    }

    pub(super) fn end(&self) -> Result<(), WireError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(WireError::Trailing { what: self.what })
        }
    }
}
