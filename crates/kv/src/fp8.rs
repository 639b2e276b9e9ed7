//! Numbers of eight bits: "e4m3fn", a sign, four bits of exponent, three of mantissa, one code that is no number, no
//! infinity. From 2^-9 to 448, to one part in 16. No scale: keys and values are within that range.

/// What [`half`] makes of a number is as much smaller: the exponents of the two formats differ by eight.
pub const UNIT: f32 = 256.0;

/// No number.
const NAN: u8 = 0x7f;
/// 448.
const GREATEST: u8 = 0x7e;
/// From here on a number is nearer to what would come after the greatest.
const TOO_GREAT: f32 = 464.0;
/// Below are multiples of 2^-9.
const LEAST_NORMAL: f32 = 1.0 / 64.0;

/// The nearest code, the even one of two; the greatest, for what is greater.
#[inline]
#[must_use]
pub fn code(x: f32) -> u8 {
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    let x = x.abs();
    let magnitude = if x.is_nan() {
        NAN
    } else if x >= TOO_GREAT {
        GREATEST
    } else if x < LEAST_NORMAL {
        // Eight of them are the least normal number, whose code is eight.
        byte((x * 512.0).round_ties_even() as u32)
    } else {
        let bits = x.to_bits();
        let nearest = (bits + 0x7_ffff + (bits >> 20 & 1)) >> 20;
        byte(nearest - ((127 - 7) << 3))
    };
    sign | magnitude
}

#[expect(clippy::cast_possible_truncation, reason = "codes have seven bits")]
const fn byte(code: u32) -> u8 {
    code as u8
}

/// Bits of the half-precision float that is [`UNIT`] times smaller. For no number it is 480 / [`UNIT`].
#[inline(always)]
#[must_use]
pub const fn half(code: u8) -> u16 {
    let code = code as u16;
    (code & 0x80) << 8 | (code & 0x7f) << 7
}

/// What a code stands for; 480 for no number, as it is read through [`half`].
#[must_use]
pub fn value(code: u8) -> f32 {
    let (exponent, mantissa) = (u32::from(code >> 3 & 15), code & 7);
    let magnitude = match exponent {
        0 => f32::from(mantissa) / 512.0,
        _ => f32::from_bits(((exponent + 127 - 7) << 23) | (u32::from(mantissa) << 20)),
    };
    if code & 0x80 == 0 {
        magnitude
    } else {
        -magnitude
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_read_and_written_as_it_is_value() {
        for c in 0..=u8::MAX {
            let read = half::f16::from_bits(half(c)).to_f32() * UNIT;
            assert_eq!(value(c).to_bits(), read.to_bits(), "{c:#x}");
            if c & 0x7f != NAN {
                assert_eq!(code(value(c)), c, "{c:#x}");
            }
        }
    }

    #[test]
    fn codes_stand_for_what_the_format_says() {
        let told = [
            (0, 0.0),
            (1, 0.001_953_125),
            (7, 0.013_671_875),
            (8, 0.015_625),
            (0x38, 1.0),
        ];
        for (code, number) in told
            .into_iter()
            .chain([(0x39, 1.125), (0x7e, 448.0), (0xb8, -1.0)])
        {
            assert_eq!(value(code), number, "{code:#x}");
        }
    }

    #[test]
    fn a_number_goes_to_the_nearest_code_and_to_the_even_one_of_two() {
        for c in 0..GREATEST {
            let (below, above) = (value(c), value(c + 1));
            let middle = f32::midpoint(below, above);
            let even = if c % 2 == 0 { c } else { c + 1 };
            assert_eq!(code(middle), even, "{middle}");
            assert_eq!(code(middle.next_down()), c, "{middle}");
            assert_eq!(code(middle.next_up()), c + 1, "{middle}");
            assert_eq!(code(-middle.next_up()), (c + 1) | 0x80, "{middle}");
        }
    }

    #[test]
    fn what_is_too_great_stays_finite_and_no_number_stays_none() {
        for x in [448.0, 463.9, 464.0, 1e30, f32::INFINITY] {
            assert_eq!((code(x), code(-x)), (GREATEST, GREATEST | 0x80), "{x}");
        }
        assert_eq!(code(f32::NAN) & 0x7f, NAN);
        assert_eq!((code(0.0), code(-0.0), code(1e-30)), (0, 0x80, 0));
    }
}
