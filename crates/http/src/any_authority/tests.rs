//! Names as Istio gives them, as the RFC codes them, in pieces of any size, through a real server.

use super::*;
use crate::{Http2Config, serve_h2};
use http::{Request, Response};
use http_body_util::Empty;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use std::convert::Infallible;
use std::sync::Arc;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

const GIVEN: &[u8] = b"outbound|9002||picker.llm.svc";
const MENDED: &[u8] = b"outbound-9002--picker.llm.svc";

fn hex(text: &str) -> Vec<u8> {
    let byte = |at| u8::from_str_radix(&text[at..at + 2], 16).unwrap();
    (0..text.len()).step_by(2).map(byte).collect()
}

/// With the codes of `BY_LENGTH`, which RFC 7541's own examples check below.
fn packed(text: &[u8]) -> Vec<u8> {
    let mut bits = String::new();
    for byte in text {
        let mut first = 0;
        for (length, symbols) in BY_LENGTH.iter().enumerate() {
            first <<= 1;
            if let Some(at) = symbols.iter().position(|s| s == byte) {
                bits.push_str(&format!("{:0length$b}", first + at));
            }
            first += symbols.len();
        }
    }
    while !bits.len().is_multiple_of(8) {
        bits.push('1');
    }
    let byte = |at| u8::from_str_radix(&bits[at..at + 8], 2).unwrap();
    (0..bits.len()).step_by(8).map(byte).collect()
}

#[test]
fn the_examples_of_the_rfc_are_unpacked() {
    for (coded, text) in [
        ("f1e3c2e5f23a6ba0ab90f4ff", "www.example.com"),
        ("a8eb10649cbf", "no-cache"),
        ("25a849e95ba97d7f", "custom-key"),
        ("25a849e95bb8e8b4bf", "custom-value"),
        (
            "d07abe941054d444a8200595040b8166e082a62d1bff",
            "Mon, 21 Oct 2013 20:13:21 GMT",
        ),
        (
            "9d29ad171863c78f0b97c8e9ae82ae43d3",
            "https://www.example.com",
        ),
        (
            "94e7821dd7f2e6c7b335dfdfcd5b3960d5af27087f3672c1ab270fb5291f9587316065c003ed4ee5b1063d5007",
            "foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1",
        ),
    ] {
        assert_eq!(unpacked(&hex(coded)).unwrap(), text.as_bytes());
        assert_eq!(packed(text.as_bytes()), hex(coded));
    }
    // The code of `|` is 0x7fc; what is cut, padded with zeros or in no name is not unpacked.
    assert_eq!(unpacked(&[0xff, 0x9f]).unwrap(), b"|");
    for bad in [&[0xff][..], &[0xff, 0x9e], &[0xff, 0xff, 0xff], &[0x00]] {
        assert!(unpacked(bad).is_none(), "{bad:x?}");
    }
}

/// A frame of a kind, on the stream `stream`.
fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags, 0, 0, 0, stream]);
    frame.extend(payload);
    frame
}

/// Headers of a request for `authority`, put into the table, plain or packed.
fn block(authority: &[u8], huffman: bool) -> Vec<u8> {
    // POST, http, /
    let mut block = vec![0x83, 0x86, 0x84, 0x41];
    if huffman {
        let packed = packed(authority);
        block.push(0x80 | packed.len() as u8);
        block.extend(packed);
    } else {
        push_string(&mut block, authority);
    }
    block
}

#[test]
fn only_what_is_no_authority_is_mended() {
    for huffman in [false, true] {
        let mended = mended_block(&block(GIVEN, huffman)).unwrap();
        assert_eq!(mended, block(MENDED, false));
        for good in [&b"picker.llm.svc:9002"[..], b"[::1]:9002", b"a"] {
            assert!(mended_block(&block(good, huffman)).is_none());
        }
    }
    // Not what is nobody's fault.
    assert!(mended_block(&block(b"a\x01b|", false)).is_none());
    assert!(mended_block(&block(b"a b|", true)).is_none());
}

#[test]
fn padding_goes_and_priority_stays() {
    let mut payload = vec![3, 0, 0, 0, 0, 16];
    payload.extend(block(GIVEN, true));
    payload.extend([0; 3]);
    let flags = END_HEADERS | PADDED | PRIORITY;
    let mended = mended_frame(&frame(HEADERS, flags, 1, &payload)).unwrap();
    let mut expected = vec![0, 0, 0, 0, 16];
    expected.extend(block(MENDED, false));
    assert_eq!(mended, frame(HEADERS, END_HEADERS | PRIORITY, 1, &expected));
    payload[0] = 200;
    assert!(mended_frame(&frame(HEADERS, flags, 1, &payload)).is_none());
}

#[test]
fn long_strings_keep_their_length() {
    for length in [0, 126, 127, 128, 254, 255, 5000] {
        let (mut coded, text) = (Vec::new(), vec![b'a'; length]);
        push_string(&mut coded, &text);
        let mut rest = &*coded;
        assert!(matches!(string(&mut rest), Some(Value::Plain(t)) if t == text));
        assert!(rest.is_empty());
    }
    assert!(integer(&mut &[0x7f, 0xff, 0xff, 0xff, 0xff, 0x7f][..], 7).is_none());
}

const SETTINGS: u8 = 4;
const DATA: u8 = 0;

/// Two requests: one whose authority goes into the table, one that refers to it there.
fn conversation() -> Vec<u8> {
    let mut sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    sent.extend(frame(SETTINGS, 0, 0, &[]));
    sent.extend(frame(HEADERS, END_HEADERS, 1, &block(GIVEN, true)));
    sent.extend(frame(DATA, 1, 1, &[7; 3000]));
    sent.extend(frame(
        HEADERS,
        END_HEADERS | 1,
        3,
        &[0x83, 0x86, 0x84, 0xbe],
    ));
    sent
}

#[tokio::test]
async fn however_bytes_come_they_go_on_alike() {
    let sent = conversation();
    let mut expected = sent.clone();
    let at = 24 + FRAME_HEAD;
    let old = FRAME_HEAD + block(GIVEN, true).len();
    let new = frame(HEADERS, END_HEADERS, 1, &block(MENDED, false));
    expected.splice(at..at + old, new);
    for (piece, room) in [(1, 4096), (7, 3), (64, 64), (5000, 10), (5000, 8192)] {
        let (mut client, server) = tokio::io::duplex(8192);
        let bytes = sent.clone();
        tokio::spawn(async move {
            for piece in bytes.chunks(piece) {
                client.write_all(piece).await.unwrap();
                tokio::task::yield_now().await;
            }
        });
        let (mut server, mut got) = (AnyAuthority::new(server), Vec::<u8>::new());
        let mut buf = vec![0; room];
        loop {
            match server.read(&mut buf).await.unwrap() {
                0 => break,
                n => got.extend(&buf[..n]),
            }
        }
        assert_eq!(got, expected, "{piece} {room}");
    }
}

#[tokio::test]
async fn a_cluster_may_be_asked_for_by_its_name() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let seen = Arc::new(parking_lot::Mutex::new(Vec::new()));
    let sees = seen.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        let authority = request.uri().authority().map(ToString::to_string);
        sees.lock().push(authority.unwrap_or_default());
        async { Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new())) }
    });
    let stop = CancellationToken::new();
    tokio::spawn(serve_h2(listener, service, Http2Config::default(), stop));
    let mut client = TcpStream::connect(at).await.unwrap();
    client.write_all(&conversation()).await.unwrap();
    // Two answers; each ends its stream.
    let mut ended = 0;
    while ended < 2 {
        let mut head = [0; FRAME_HEAD];
        client.read_exact(&mut head).await.unwrap();
        let ((kind, flags), length) = super::head(&head).unwrap();
        client.read_exact(&mut vec![0; length]).await.unwrap();
        assert!(kind != 3 && kind != 7, "reset or gone away");
        ended += usize::from(kind == HEADERS && flags & 1 != 0);
    }
    let mended = String::from_utf8(MENDED.to_vec()).unwrap();
    assert_eq!(*seen.lock(), [mended.clone(), mended]);
}
