//! Bytes of a kvx peer: what is understood means the same after it has been written and read again.
#![no_main]

use baton_kv_transfer::wire::{
    FRAME_HEADER_LEN, MAX_BODY, Message, decode_chunk_header, decode_frame_header, decode_message,
    decode_preface, encode_frame,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(preface) = decode_preface(bytes) {
        assert_eq!(decode_preface(&preface.encode()), Ok(preface));
    }
    if let Ok(header) = decode_chunk_header(bytes) {
        assert_eq!(decode_chunk_header(&header.encode()), Ok(header));
    }
    let Some((header, body)) = bytes.split_at_checked(FRAME_HEADER_LEN) else {
        return;
    };
    if let Ok(header) = decode_frame_header(header, MAX_BODY)
        && let Ok(message) = decode_message(header.kind, body)
        && !matches!(message, Message::Unknown { .. })
    {
        let frame = encode_frame(header.stream, &message);
        let (again, written) = frame.split_at(FRAME_HEADER_LEN);
        let again = decode_frame_header(again, MAX_BODY).expect("our own header");
        assert_eq!((again.kind, again.stream), (header.kind, header.stream));
        assert_eq!(decode_message(again.kind, written), Ok(message));
    }
});
