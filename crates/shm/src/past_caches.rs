//! A copy that leaves the caches as they are, for what is larger than they: memory is written without being read first.

/// Copies like [`std::ptr::copy_nonoverlapping`].
///
/// # Safety
/// As that one's.
pub(crate) unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    // Whole lines of the cache only: the system's own copy does what is before them and after.
    let head = to.align_offset(LINE).min(len);
    let body = (len - head) / LINE * LINE;
    let tail = head + body;
    // SAFETY: the three ranges lie within the one that was given, and the middle one begins at a line of `to`.
    unsafe {
        std::ptr::copy_nonoverlapping(from, to, head);
        lines(from.add(head), to.add(head), body);
        std::ptr::copy_nonoverlapping(from.add(tail), to.add(tail), len - tail);
    }
}

/// Bytes of a line of the cache.
const LINE: usize = 64;

/// Copies whole lines; `to` must begin with one.
#[cfg(target_arch = "x86_64")]
unsafe fn lines(from: *const u8, to: *mut u8, len: usize) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};
    for at in (0..len).step_by(LINE) {
        // SAFETY: every x86-64 processor has these; the line lies in both ranges, and `to` is aligned.
        unsafe {
            let (from, to) = (from.add(at).cast::<__m128i>(), to.add(at).cast::<__m128i>());
            let line = [0, 1, 2, 3].map(|i| _mm_loadu_si128(from.add(i)));
            for (i, part) in line.into_iter().enumerate() {
                _mm_stream_si128(to.add(i), part);
            }
        }
    }
    // SAFETY: as above. What was written so is ordered against nothing else until then.
    unsafe { _mm_sfence() }
}

/// Others have no such writes within reach.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn lines(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: the caller's.
    unsafe { std::ptr::copy_nonoverlapping(from, to, len) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_bytes_are_copied_and_none_beside_them() {
        let from: Vec<u8> = (0..1000).map(|i| (i * 7 % 251) as u8 | 1).collect();
        for begin in [0, 1, 15, 63, 64] {
            for len in [0, 1, 63, 64, 65, 128, 500] {
                let mut to = vec![0; 700];
                // SAFETY: both ranges lie in the vectors, which are different ones.
                unsafe { copy(from[3..].as_ptr(), to[begin..].as_mut_ptr(), len) };
                assert_eq!(to[begin..begin + len], from[3..3 + len]);
                let rest = [&to[..begin], &to[begin + len..]].concat();
                assert!(rest.iter().all(|&x| x == 0), "{begin} {len}");
            }
        }
    }
}
