//! Element types of arrays, as the plugin numbers them and as the host lays them out.

use crate::{Error, Result};
use std::fmt;

macro_rules! dtypes {
    ($($(#[$doc:meta])* $name:ident $raw:literal $size:literal $text:literal)*) => {
        /// Element type of an array. Types narrower than a byte are left out.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum DType { $($(#[$doc])* $name,)* }

        impl DType {
            /// Bytes of one element in host memory.
            pub const fn bytes(self) -> usize {
                match self { $(Self::$name => $size,)* }
            }

            /// XLA's short name (`pred`, `s32`, `bf16`).
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            pub(crate) const fn to_raw(self) -> i32 {
                match self { $(Self::$name => $raw,)* }
            }

            pub(crate) fn from_raw(raw: i32) -> Result<Self> {
                match raw {
                    $($raw => Ok(Self::$name),)*
                    _ => Err(Error::UnknownElementType(raw)),
                }
            }
        }
    };
}

dtypes! {
    /// Boolean, one byte that is 0 or 1.
    Pred 1 1 "pred"
    /// Signed, 8 bits.
    S8 2 1 "s8"
    /// Signed, 16 bits.
    S16 3 2 "s16"
    /// Signed, 32 bits.
    S32 4 4 "s32"
    /// Signed, 64 bits.
    S64 5 8 "s64"
    /// Unsigned, 8 bits.
    U8 6 1 "u8"
    /// Unsigned, 16 bits.
    U16 7 2 "u16"
    /// Unsigned, 32 bits.
    U32 8 4 "u32"
    /// Unsigned, 64 bits.
    U64 9 8 "u64"
    /// IEEE half.
    F16 10 2 "f16"
    /// IEEE single.
    F32 11 4 "f32"
    /// IEEE double.
    F64 12 8 "f64"
    /// bfloat16.
    BF16 13 2 "bf16"
    /// 8-bit float, 5 bits of exponent.
    F8E5M2 16 1 "f8e5m2"
    /// 8-bit float, 4 bits of exponent, finite values only.
    F8E4M3FN 17 1 "f8e4m3fn"
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Bytes that an array takes in host memory, dense.
pub(crate) fn host_size(dtype: DType, dims: &[i64]) -> Result<usize> {
    let size = dims.iter().try_fold(dtype.bytes(), |size, &dim| {
        size.checked_mul(usize::try_from(dim).ok()?)
    });
    size.filter(|&size| isize::try_from(size).is_ok())
        .ok_or_else(|| Error::Dimensions(dims.to_vec()))
}

mod sealed {
    pub trait Sealed {}
}

/// A Rust type whose slices have the layout of an array on the host. Sealed.
///
/// For `pred`, `f16`, `bf16` and the 8-bit floats use bytes.
pub trait Element: sealed::Sealed + Copy + Default + Send + Sync + 'static {
    /// The array type it matches.
    const DTYPE: DType;
}

macro_rules! elements {
    ($($ty:ty => $dtype:ident),*) => { $(
        impl sealed::Sealed for $ty {}
        impl Element for $ty {
            const DTYPE: DType = DType::$dtype;
        }
    )* };
}

elements! { i8 => S8, i16 => S16, i32 => S32, i64 => S64, u8 => U8, u16 => U16, u32 => U32, u64 => U64, f32 => F32, f64 => F64 }

/// The bytes of a slice.
pub(crate) fn as_bytes<T: Element>(values: &[T]) -> &[u8] {
    // SAFETY: the sealed trait is implemented for plain numbers only: no padding, every byte initialised; the
    // view has the slice's own extent and lifetime.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// The bytes of a slice, to be overwritten.
pub(crate) fn as_bytes_mut<T: Element>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: as in `as_bytes`; besides, every pattern of bytes is a valid number, and the borrow is exclusive.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_size_is_dense_and_refuses_what_cannot_be() {
        assert_eq!(host_size(DType::BF16, &[3, 5]).unwrap(), 30);
        assert_eq!(host_size(DType::F32, &[]).unwrap(), 4);
        assert_eq!(host_size(DType::F32, &[7, 0]).unwrap(), 0);
        assert!(host_size(DType::F32, &[-1]).is_err());
        assert!(host_size(DType::F32, &[i64::MAX, 2]).is_err());
    }

    #[test]
    fn raw_numbers_round_trip() {
        for dtype in [
            DType::Pred,
            DType::S8,
            DType::U32,
            DType::F16,
            DType::BF16,
            DType::F8E4M3FN,
        ] {
            assert_eq!(DType::from_raw(dtype.to_raw()).unwrap(), dtype);
        }
        assert!(matches!(
            DType::from_raw(99),
            Err(Error::UnknownElementType(99))
        ));
    }
}
