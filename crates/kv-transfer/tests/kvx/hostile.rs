//! Strangers and liars at a server's door: it cuts them off, and goes on serving the others.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use crate::common::*;
use baton_kv_transfer::wire::{Hello, Message, Preface, Role, encode_frame};
use baton_kv_transfer::{KvClient, KvServer, RejectCode, fingerprint};

fn knock(server: &KvServer) -> TcpStream {
    let stream = TcpStream::connect(server.local_addr()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Reads until the server ends the connection; a reset is an end too.
fn until_cut(mut stream: TcpStream) -> Vec<u8> {
    let mut said = Vec::new();
    match stream.read_to_end(&mut said) {
        Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
            panic!("the server did not hang up")
        }
        _ => said,
    }
}

fn impatient() -> KvServer {
    let mut cfg = server_config();
    cfg.auth_timeout = Duration::from_millis(100);
    start(cfg)
}

fn serves(server: &KvServer) {
    let client = KvClient::new(client_config()).unwrap();
    let params = server.publish(&export(2, 1)).unwrap();
    assert!(fetch(&client, &params).unwrap().data() == bytes(2, 1));
}

fn hello() -> Message {
    Message::Hello(Hello {
        boot_id: 1,
        fingerprint: fingerprint(&layout()),
        nonce: [0; 16],
        max_chunk: 1,
        streams: 1,
        features: 0,
    })
}

#[test]
fn garbage_is_cut_off() {
    let server = start(server_config());
    let control = Preface {
        role: Role::Control,
        is_tls: false,
        is_near: false,
    }
    .encode();
    let data = Preface {
        role: Role::Data,
        is_tls: false,
        is_near: false,
    }
    .encode();
    for garbage in [
        vec![0; 4],
        vec![0; 64],
        vec![0xff; 9000],
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        [&control[..], &[0xff; 64]].concat(),
        [&data[..], &[0xff; 64]].concat(),
        // A body longer than a stranger may send.
        [&control[..], &[0, 0, 16, 0, 1, 0, 0, 0]].concat(),
        [
            &control[..],
            &encode_frame(0, &Message::Auth { mac: [0; 32] }),
        ]
        .concat(),
        [&control[..], &encode_frame(0, &Message::Ping { id: 1 })].concat(),
        [
            &data[..],
            &encode_frame(
                0,
                &Message::Attach {
                    session: 0,
                    proof: [0; 32],
                },
            ),
        ]
        .concat(),
        [&data[..], &encode_frame(0, &hello())].concat(),
    ] {
        let mut stream = knock(&server);
        stream.write_all(&garbage).unwrap();
        let _ = stream.shutdown(std::net::Shutdown::Write);
        until_cut(stream);
    }
    eventually("all are counted", || server.stats().turned_away == 11);
    serves(&server);
}

#[test]
fn a_wrong_proof_is_refused_by_name() {
    let server = start(server_config());
    let mut stream = knock(&server);
    stream
        .write_all(
            &Preface {
                role: Role::Control,
                is_tls: false,
                is_near: false,
            }
            .encode(),
        )
        .unwrap();
    stream.write_all(&encode_frame(0, &hello())).unwrap();
    stream
        .write_all(&encode_frame(0, &Message::Auth { mac: [0; 32] }))
        .unwrap();
    let said = until_cut(stream);
    assert!(said.ends_with(&encode_frame(
        0,
        &Message::GoAway {
            code: RejectCode::Unauthorized
        }
    )));
    assert_eq!(server.stats().rejected(RejectCode::Unauthorized), 1);
}

#[test]
fn strangers_that_say_nothing_or_only_a_little_are_cut_off_in_time() {
    let server = impatient();
    let control = Preface {
        role: Role::Control,
        is_tls: false,
        is_near: false,
    }
    .encode();
    for little in [
        &[][..],
        &control[..3],
        &control[..],
        &[&control[..], &[9, 0]].concat(),
    ] {
        let mut stream = knock(&server);
        stream.write_all(little).unwrap();
        until_cut(stream);
    }
    eventually("nobody is left", || server.stats().connections == 0);
    serves(&server);
}

#[test]
fn connections_are_bounded() {
    let mut cfg = server_config();
    cfg.max_connections = 3;
    let server = start(cfg);
    let waiting: Vec<_> = (0..3).map(|_| knock(&server)).collect();
    eventually("the house is full", || server.stats().connections == 3);
    until_cut(knock(&server));
    assert_eq!(server.stats().turned_away, 1);
    drop(waiting);
    eventually("the house is empty", || server.stats().connections == 0);
    serves(&server);
}

#[test]
fn strangers_are_bounded_below_the_connections() {
    let mut cfg = server_config();
    cfg.auth_timeout = PATIENCE;
    let server = start(cfg);
    let strangers: Vec<_> = (0..256).map(|_| knock(&server)).collect();
    eventually("they are in", || server.stats().connections == 256);
    until_cut(knock(&server));
    drop(strangers);
    eventually("they are gone", || server.stats().connections == 0);
    serves(&server);
}

#[test]
fn dropping_the_server_hangs_up_on_everybody() {
    let server = start(server_config());
    let stream = knock(&server);
    eventually("it is in", || server.stats().connections == 1);
    drop(server);
    until_cut(stream);
}
