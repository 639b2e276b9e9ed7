//! Encrypted hand-overs, and those who would like to listen in, pretend or meddle. A man in the middle here can do whatever
//! the network lets him, with certificates of his own; he does not know the secret.

use std::io::{BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use crate::common::*;
use baton_kv::KvTransferParams;
use baton_kv_transfer::wire::{
    FRAME_HEADER_LEN, Hello, MAX_BODY, Message, PREFACE_LEN, Preface, Role, decode_frame_header,
    decode_message, decode_preface, encode_frame,
};
use baton_kv_transfer::{
    KvClient, KvClientConfig, KvServer, KvServerConfig, RejectCode, TransferError, fingerprint,
};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection, StreamOwned};

const N: u32 = 4;

fn tls_server_config() -> KvServerConfig {
    configs(true).0
}

fn tls_client_config() -> KvClientConfig {
    configs(true).1
}

fn tls_server() -> KvServer {
    start(tls_server_config())
}

fn tls_client() -> KvClient {
    KvClient::new(tls_client_config()).unwrap()
}

fn serves(server: &KvServer) {
    let params = server.publish(&export(2, 1)).unwrap();
    let pulled = fetch(&tls_client(), &params).unwrap();
    assert!(pulled.data() == bytes(2, 1));
}

/// As somebody on the way would alter them.
fn altered(params: &KvTransferParams, port: u16, tls: bool) -> KvTransferParams {
    let mut params = params.clone();
    params.remote_port = port;
    params.kvx.as_mut().unwrap().tls = tls;
    params
}

fn preface(role: Role, is_tls: bool) -> [u8; PREFACE_LEN] {
    let is_near = false;
    Preface {
        role,
        is_tls,
        is_near,
    }
    .encode()
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

trait Duplex: Read + Write + Send {}
impl<T: Read + Write + Send> Duplex for T {}
type Wire = Box<dyn Duplex>;

/// Takes every certificate.
#[derive(Debug)]
struct Anyone;

impl rustls::client::danger::ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        vec![rustls::SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// The calling end of TLS, of whatever version the other end likes.
fn calling(tcp: TcpStream) -> Wire {
    let config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone))
        .with_no_client_auth();
    let name = ServerName::try_from("baton").unwrap();
    let conn = ClientConnection::new(Arc::new(config), name).unwrap();
    Box::new(StreamOwned::new(conn, tcp))
}

/// The answering end of TLS, with a fresh certificate.
fn answering(tcp: TcpStream) -> Wire {
    let made = rcgen::generate_simple_self_signed(["baton".to_owned()]).unwrap();
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key.into())
        .unwrap();
    let conn = ServerConnection::new(Arc::new(config)).unwrap();
    Box::new(StreamOwned::new(conn, tcp))
}

/// Connects and says what for.
fn knock(addr: SocketAddr, role: Role, is_tls: bool) -> Wire {
    let mut tcp = TcpStream::connect(addr).unwrap();
    tcp.set_read_timeout(Some(PATIENCE)).unwrap();
    tcp.write_all(&preface(role, is_tls)).unwrap();
    if is_tls { calling(tcp) } else { Box::new(tcp) }
}

fn hear(wire: &mut Wire) -> Option<Message> {
    let mut header = [0; FRAME_HEADER_LEN];
    wire.read_exact(&mut header).ok()?;
    let header = decode_frame_header(&header, MAX_BODY).unwrap();
    let mut body = vec![0; header.len as usize];
    wire.read_exact(&mut body).ok()?;
    Some(decode_message(header.kind, &body).unwrap())
}

fn say(wire: &mut Wire, message: &Message) {
    // Whether it is heard is for the test to see.
    let _ = wire.write_all(&encode_frame(0, message));
    let _ = wire.flush();
}

/// Hands one message on.
fn hand_on(from: &mut Wire, to: &mut Wire) -> Option<Message> {
    let message = hear(from)?;
    say(to, &message);
    Some(message)
}

/// Whoever connects to the result has to do with `act`, which knows what the connection is for.
fn middleman(act: impl Fn(Role, TcpStream) + Send + Sync + 'static) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let act = Arc::new(act);
    thread::spawn(move || {
        for down in listener.incoming() {
            let (mut down, act) = (down.unwrap(), Arc::clone(&act));
            thread::spawn(move || {
                let mut preface = [0; PREFACE_LEN];
                if down.read_exact(&mut preface).is_ok() {
                    act(decode_preface(&preface).unwrap().role, down);
                }
            });
        }
    });
    port
}

/// Hands everything on as it is, except that `spoil` sees what comes from the producer, and may end it all.
fn pass(
    (role, down): (Role, TcpStream),
    target: SocketAddr,
    spoil: impl Fn(&mut [u8]) -> bool + Send + 'static,
) {
    let mut up = TcpStream::connect(target).unwrap();
    up.write_all(&preface(role, true)).unwrap();
    let (mut from_down, mut to_up) = (down.try_clone().unwrap(), up.try_clone().unwrap());
    thread::spawn(move || {
        let _ = std::io::copy(&mut from_down, &mut to_up);
        let _ = to_up.shutdown(Shutdown::Both);
    });
    let (mut down, mut buf) = (down, [0; 4096]);
    while let Ok(n @ 1..) = up.read(&mut buf) {
        if !spoil(&mut buf[..n]) || down.write_all(&buf[..n]).is_err() {
            break;
        }
    }
    let _ = down.shutdown(Shutdown::Both);
    let _ = up.shutdown(Shutdown::Both);
}

fn untouched(_: &mut [u8]) -> bool {
    true
}

#[test]
fn a_consumer_and_a_producer_that_encrypt_differently_part_before_they_connect() {
    for tls in [false, true] {
        let (server, client) = (
            start(configs(tls).0),
            KvClient::new(configs(!tls).1).unwrap(),
        );
        let params = server.publish(&export(N, 1)).unwrap();
        assert_eq!(params.kvx.as_ref().unwrap().tls, tls);
        let refused = client.hold(&params).unwrap_err().to_string();
        let (ours, theirs) = if tls {
            ("none", "TLS")
        } else {
            ("TLS", "none")
        };
        assert_eq!(
            refused,
            format!("encryption differs: ours is {ours}, theirs is {theirs}")
        );
        assert_eq!(server.stats().connections, 0);
    }
}

#[test]
fn a_side_that_was_told_wrong_is_told_why_by_the_other() {
    for tls in [false, true] {
        let (server, client) = (
            start(configs(tls).0),
            KvClient::new(configs(!tls).1).unwrap(),
        );
        let params = server.publish(&export(N, 1)).unwrap();
        let lied_to = altered(&params, params.remote_port, !tls);
        let refused = fetch(&client, &lied_to).unwrap_err();
        if tls {
            assert_eq!(refused, TransferError::Rejected(RejectCode::Encryption));
        } else {
            assert!(
                matches!(
                    refused,
                    TransferError::Mismatch {
                        what: "encryption",
                        ..
                    }
                ),
                "{refused:?}"
            );
        }
        assert_eq!(server.stats().rejected(RejectCode::Encryption), 1);
        assert_eq!(server.stats().leases, 1, "nothing was lost");
    }
}

#[test]
fn one_who_pretends_to_be_the_producer_is_found_out() {
    // It answers with nothing, with the consumer's own proof, or with the consumer's own hello and proof.
    for (reflects_hello, reflects_proof) in [(false, false), (false, true), (true, true)] {
        let port = middleman(move |_, down| {
            let mut down = answering(down);
            let theirs = hear(&mut down).unwrap();
            let ours = if reflects_hello { theirs } else { hello() };
            say(&mut down, &ours);
            say(&mut down, &Message::Challenge { nonce: [1; 32] });
            let Some(Message::Auth { mac }) = hear(&mut down) else {
                panic!("no proof");
            };
            let mac = if reflects_proof { mac } else { [0; 32] };
            say(&mut down, &Message::Welcome { mac, session: 0 });
        });
        let params = tls_server().publish(&export(N, 1)).unwrap();
        let refused = fetch(&tls_client(), &altered(&params, port, true));
        assert_eq!(refused.unwrap_err(), TransferError::Impostor);
    }
}

#[test]
fn one_who_pretends_to_be_a_consumer_is_refused() {
    let server = tls_server();
    let mut wire = knock(server.local_addr(), Role::Control, true);
    say(&mut wire, &hello());
    assert!(matches!(hear(&mut wire), Some(Message::Hello(_))));
    assert!(matches!(hear(&mut wire), Some(Message::Challenge { .. })));
    say(&mut wire, &Message::Auth { mac: [0; 32] });
    let code = RejectCode::Unauthorized;
    assert_eq!(hear(&mut wire), Some(Message::GoAway { code }));
    assert_eq!(hear(&mut wire), None);
    eventually("it is counted", || server.stats().turned_away == 1);
    serves(&server);
}

#[test]
fn one_who_relays_the_handshake_between_two_connections_of_his_own_is_found_out() {
    // As each side speaks: with TLS on both, or with one side talked out of it.
    for (consumer, producer) in [(true, true), (true, false), (false, true)] {
        let server = start(configs(producer).0);
        let target = server.local_addr();
        let (tx, verdict) = channel();
        let tx = Mutex::new(tx);
        let port = middleman(move |role, down| {
            let mut down = if consumer {
                answering(down)
            } else {
                Box::new(down)
            };
            let mut up = knock(target, role, producer);
            hand_on(&mut down, &mut up);
            hand_on(&mut up, &mut down);
            hand_on(&mut up, &mut down);
            hand_on(&mut down, &mut up);
            let verdict = hand_on(&mut up, &mut down);
            tx.lock().unwrap().send(verdict).unwrap();
        });
        let client = KvClient::new(configs(consumer).1).unwrap();
        let params = altered(&server.publish(&export(N, 1)).unwrap(), port, consumer);
        let refused = fetch(&client, &params).unwrap_err();
        let code = RejectCode::Unauthorized;
        assert_eq!(refused, TransferError::Rejected(code));
        let verdict = verdict.recv_timeout(PATIENCE).unwrap();
        assert_eq!(verdict, Some(Message::GoAway { code }));
        assert_eq!(server.stats().rejected(code), 1);
        assert_eq!(server.stats().leases, 1, "nothing was lost");
    }
}

#[test]
fn one_who_diverts_a_data_connection_gets_nothing_and_can_use_nothing() {
    let server = tls_server();
    let target = server.local_addr();
    let (tx, heard) = channel();
    let tx = Mutex::new(tx);
    let port = middleman(move |role, down| {
        if role == Role::Control {
            return pass((role, down), target, untouched);
        }
        let (mut down, mut up) = (answering(down), knock(target, role, true));
        let attach = hand_on(&mut down, &mut up).unwrap();
        tx.lock().unwrap().send(attach).unwrap();
        hand_on(&mut up, &mut down);
    });
    let params = altered(&server.publish(&export(N, 1)).unwrap(), port, true);
    let client = tls_client();
    let held = client.hold(&params).unwrap();
    let refused = pull(&client, &held, 0..N).unwrap_err();
    // To the consumer it looks as if the producer had given the session up; it tries once more.
    let broken = TransferError::Broken(std::io::ErrorKind::NotConnected);
    assert_eq!(refused, broken);
    let attach = heard.recv_timeout(PATIENCE).unwrap();
    assert!(matches!(attach, Message::Attach { .. }));
    // Later, and again.
    for _ in 0..2 {
        let mut wire = knock(target, Role::Data, true);
        say(&mut wire, &attach);
        let code = RejectCode::Unauthorized;
        assert_eq!(hear(&mut wire), Some(Message::GoAway { code }));
    }
    assert_eq!(server.stats().rejected(RejectCode::Unauthorized), 4);
    assert_eq!(server.stats().bytes_sent, 0);
}

#[test]
fn one_who_answers_a_diverted_data_connection_himself_is_found_out() {
    for reflects in [false, true] {
        let server = tls_server();
        let target = server.local_addr();
        let port = middleman(move |role, down| {
            if role == Role::Control {
                return pass((role, down), target, untouched);
            }
            let mut down = answering(down);
            let Some(Message::Attach { proof, .. }) = hear(&mut down) else {
                panic!("no attach");
            };
            let proof = if reflects { proof } else { [0; 32] };
            say(&mut down, &Message::Attached { stream: 1, proof });
            // Chunks of his own would come next.
            let _ = hear(&mut down);
        });
        let params = altered(&server.publish(&export(N, 1)).unwrap(), port, true);
        let refused = fetch(&tls_client(), &params).unwrap_err();
        assert_eq!(refused, TransferError::Impostor);
    }
}

#[test]
fn what_crosses_the_network_is_not_what_was_handed_over() {
    let server = tls_server();
    let target = server.local_addr();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sniffer = Arc::clone(&seen);
    let port = middleman(move |role, down| {
        let sniffer = Arc::clone(&sniffer);
        let sniff = move |bytes: &mut [u8]| {
            sniffer.lock().unwrap().extend_from_slice(bytes);
            true
        };
        pass((role, down), target, sniff);
    });
    let params = altered(&server.publish(&export(N, 1)).unwrap(), port, true);
    let pulled = fetch(&tls_client(), &params).unwrap();
    assert!(pulled.data() == bytes(N, 1));
    let seen = seen.lock().unwrap();
    assert!(seen.len() > pulled.data().len());
    let is_there = |what: &[u8]| seen.windows(what.len()).any(|window| window == what);
    assert!(!is_there(&pulled.data()[..16]) && !is_there(&pulled.data()[1000..1016]));
}

#[test]
fn a_flipped_bit_ends_the_connection_and_the_rest_comes_through_another() {
    spoiled(|bytes| {
        bytes[0] ^= 1;
        true
    });
}

#[test]
fn an_encrypted_connection_that_is_cut_is_replaced_and_only_the_rest_is_sent_again() {
    spoiled(|_| false);
}

/// A transfer whose first data connection suffers after half of the bytes.
fn spoiled(spoil: fn(&mut [u8]) -> bool) {
    let server = tls_server();
    let (target, n) = (server.local_addr(), 40);
    let whole = n as usize * layout().block_bytes();
    let is_first = AtomicBool::new(true);
    let port = middleman(move |role, down| {
        if role == Role::Control || !is_first.swap(false, Ordering::SeqCst) {
            return pass((role, down), target, untouched);
        }
        let passed = AtomicUsize::new(0);
        pass((role, down), target, move |bytes| {
            let passed = passed.fetch_add(bytes.len(), Ordering::SeqCst);
            passed < whole / 2 || spoil(bytes)
        });
    });
    let params = altered(&server.publish(&export(n, 1)).unwrap(), port, true);
    let client = tls_client();
    let pulled = fetch(&client, &params).unwrap();
    assert!(pulled.data() == bytes(n, 1));
    assert_eq!(client.stats().crc_errors, 0, "TLS sees it first");
    let received = client.stats().bytes_received;
    assert_eq!(received, whole as u64, "no chunk came twice");
}

#[test]
fn an_encrypted_connection_that_trickles_is_given_up_when_the_time_for_it_all_is_over() {
    let server = tls_server();
    let target = server.local_addr();
    let port = middleman(move |role, mut down| {
        if role == Role::Control {
            return pass((role, down), target, untouched);
        }
        let mut to_down = down.try_clone().unwrap();
        let mut up = TcpStream::connect(target).unwrap();
        up.write_all(&preface(role, true)).unwrap();
        let (mut to_up, passed) = (up.try_clone().unwrap(), AtomicUsize::new(0));
        thread::spawn(move || std::io::copy(&mut down, &mut to_up));
        // The handshake passes; of the chunks every byte keeps the consumer waiting for its record.
        for byte in BufReader::new(up).bytes().map_while(Result::ok) {
            if passed.fetch_add(1, Ordering::SeqCst) > 2000 {
                thread::park_timeout(Duration::from_millis(10));
            }
            if to_down.write_all(&[byte]).is_err() {
                return;
            }
        }
    });
    let params = altered(&server.publish(&export(N, 1)).unwrap(), port, true);
    let mut cfg = tls_client_config();
    cfg.total_timeout = Duration::from_millis(500);
    let client = KvClient::new(cfg).unwrap();
    let outcome = fetch(&client, &params);
    assert!(
        matches!(outcome, Err(TransferError::TimedOut { .. })),
        "{outcome:?}"
    );
}

/// What a server at `addr` still says to one who writes `bytes`, until it hangs up.
fn until_cut(server: &KvServer, bytes: &[u8]) -> Vec<u8> {
    let mut tcp = TcpStream::connect(server.local_addr()).unwrap();
    tcp.set_read_timeout(Some(PATIENCE)).unwrap();
    // It may hang up before it has heard all.
    let _ = tcp.write_all(bytes);
    let mut said = Vec::new();
    if let Err(error) = tcp.read_to_end(&mut said) {
        assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "no end");
    }
    said
}

#[test]
fn garbage_in_place_of_tls_is_cut_off() {
    let server = tls_server();
    let control = preface(Role::Control, true);
    let garbage = [
        vec![0; 64],
        vec![0xff; 9000],
        encode_frame(0, &hello()),
        // A record longer than records may be, one of a version that never was, and an empty handshake message.
        vec![22, 3, 1, 0xff, 0xff, 1, 0, 0, 1, 0],
        vec![22, 9, 9, 0, 1, 1],
        vec![22, 3, 1, 0, 4, 1, 0, 0, 0],
        // Data before the handshake.
        vec![23, 3, 3, 0, 1, 0],
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
    ];
    for garbage in &garbage {
        until_cut(&server, &[&control[..], garbage].concat());
    }
    eventually("all are counted", || {
        server.stats().turned_away == garbage.len() as u64
    });
    serves(&server);
}

#[test]
fn of_a_stranger_few_bytes_are_read() {
    let mut cfg = tls_server_config();
    // Only the bytes can end it.
    cfg.auth_timeout = 2 * PATIENCE;
    let server = start(cfg);
    // A hello of 60 000 bytes, of which no end comes.
    let mut endless = preface(Role::Control, true).to_vec();
    endless.extend([22, 3, 1, 0x3f, 0xff, 1, 0, 0xea, 0x60]);
    endless.extend([0; 0x3fff - 4]);
    for _ in 0..2 {
        endless.extend([22, 3, 1, 0x3f, 0xff]);
        endless.extend([0; 0x3fff]);
    }
    until_cut(&server, &endless);
    eventually("it is counted", || server.stats().turned_away == 1);
    serves(&server);
}

#[test]
fn strangers_that_stop_anywhere_in_tls_are_cut_off_in_time() {
    let mut cfg = tls_server_config();
    cfg.auth_timeout = Duration::from_millis(200);
    let server = start(cfg);
    let control = preface(Role::Control, true);
    until_cut(&server, &control);
    until_cut(&server, &[&control[..], &[22, 3, 1]].concat());
    // After TLS's handshake, and in the middle of ours.
    let mut silent = knock(server.local_addr(), Role::Control, true);
    silent.flush().unwrap();
    assert_eq!(hear(&mut silent), None);
    let mut half = knock(server.local_addr(), Role::Control, true);
    say(&mut half, &hello());
    assert!(matches!(hear(&mut half), Some(Message::Hello(_))));
    assert!(matches!(hear(&mut half), Some(Message::Challenge { .. })));
    assert_eq!(hear(&mut half), None);
    eventually("nobody is left", || server.stats().connections == 0);
}

#[test]
fn on_one_machine_memory_is_shared_under_tls_too() {
    let mut cfg = tls_client_config();
    cfg.shares_memory = true;
    let (server, client) = (tls_server(), KvClient::new(cfg).unwrap());
    let pulled = fetch(&client, &server.publish(&export(N, 1)).unwrap()).unwrap();
    assert!(pulled.data() == bytes(N, 1));
    let (served, whole) = (server.stats(), bytes(N, 1).len() as u64);
    assert_eq!((served.bytes_lent, served.bytes_sent), (whole, 0));
}
