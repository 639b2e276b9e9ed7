//! What the socket tests share: a small layout, a server, a client, and a proxy between them that understands
//! chunks and can spoil them.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use baton_kv::{BlockId, DType, KvLayout, KvTransferParams};
use baton_kv_transfer::wire::{
    CHUNK_HEADER_LEN, ChunkHeader, FRAME_HEADER_LEN, MAX_BODY, PREFACE_LEN, Role,
    decode_chunk_header, decode_frame_header, decode_preface,
};
use baton_kv_transfer::{
    Export, Held, KvClient, KvClientConfig, KvServer, KvServerConfig, PullGuard, Pulled, Secret,
    TransferError,
};

/// Long enough for any machine; no test waits for it unless it fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn layout() -> KvLayout {
    KvLayout {
        n_layers: 4,
        n_kv_heads: 2,
        head_dim: 16,
        block_size: 4,
        dtype: DType::F32,
        model_fingerprint: 7,
    }
}

pub(crate) fn secret() -> Secret {
    Secret::new(b"a secret that only tests know").unwrap()
}

pub(crate) fn server_config() -> KvServerConfig {
    let mut cfg = KvServerConfig::new("127.0.0.1:0".parse().unwrap(), secret(), layout());
    cfg.chunk_bytes = 1000;
    cfg
}

pub(crate) fn client_config() -> KvClientConfig {
    let mut cfg = KvClientConfig::new(secret(), layout(), 64 << 20);
    // Most tests are about sockets.
    cfg.shares_memory = false;
    cfg
}

/// Both sides', encrypted or not.
pub(crate) fn configs(tls: bool) -> (KvServerConfig, KvClientConfig) {
    let (mut server, mut client) = (server_config(), client_config());
    (server.tls, client.tls) = (tls, tls);
    (server, client)
}

pub(crate) fn bytes(n_blocks: u32, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let len = n_blocks as usize * layout().block_bytes();
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..len).map(|_| next()).collect()
}

pub(crate) fn export(n_blocks: u32, seed: u64) -> Export {
    Export {
        blocks: (0..n_blocks).map(BlockId).collect(),
        n_tokens: n_blocks * layout().block_size - 1,
        data: bytes(n_blocks, seed),
    }
}

/// What a pull of `blocks` out of `data` must bring, by the definition of the canonical order.
pub(crate) fn select(data: &[u8], blocks: Range<u32>) -> Vec<u8> {
    let layout = layout();
    let cell = layout.head_block_bytes();
    let row = data.len() / (layout.n_layers * layout.n_kv_heads) as usize;
    let cells = blocks.start as usize * cell..blocks.end as usize * cell;
    data.chunks(row)
        .flat_map(|r| r[cells.clone()].to_vec())
        .collect()
}

pub(crate) type Outcome = Result<Pulled, TransferError>;

pub(crate) fn start_pull(
    client: &KvClient,
    held: &Held,
    blocks: Range<u32>,
) -> (PullGuard, Receiver<Outcome>) {
    let (tx, rx) = channel();
    let done = Box::new(move |result| drop(tx.send(result)));
    (
        client.pull(held, blocks.start, blocks.end - blocks.start, done),
        rx,
    )
}

pub(crate) fn pull(client: &KvClient, held: &Held, blocks: Range<u32>) -> Outcome {
    let (_guard, rx) = start_pull(client, held, blocks);
    rx.recv_timeout(PATIENCE).expect("a pull always calls back")
}

/// Holds, and pulls everything.
pub(crate) fn fetch(client: &KvClient, params: &KvTransferParams) -> Outcome {
    let held = client.hold(params)?;
    let all = 0..held.n_blocks();
    pull(client, &held, all)
}

/// Waits until `condition` holds.
pub(crate) fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "never: {what}");
        thread::park_timeout(Duration::from_millis(2));
    }
}

pub(crate) fn start(cfg: KvServerConfig) -> KvServer {
    KvServer::start(cfg).unwrap()
}

/// What becomes of a chunk on its way.
pub(crate) enum Fate {
    /// These bytes go on.
    Forward(Vec<u8>),
    /// Nothing goes on any more, and nothing ends.
    Stall,
    /// The connection ends.
    Cut,
}

pub(crate) type Tamper = Box<dyn FnMut(&ChunkHeader, Vec<u8>) -> Fate + Send>;

/// Forwards connections to a server; the chunks of data connections pass through `tamper`.
pub(crate) struct Proxy {
    pub(crate) addr: SocketAddr,
    data: Arc<DataConnections>,
}

/// The server's ends of data connections, and whether the consumer's stay open without them.
type DataConnections = Mutex<Vec<(TcpStream, Arc<AtomicBool>)>>;

impl Proxy {
    /// Its threads end with the connections that they serve, or with the test.
    pub(crate) fn start(target: SocketAddr, tamper: Tamper) -> Self {
        Self::deaf(target, tamper, Arc::default())
    }

    /// As soon as `is_deaf` says so, nothing that the consumer says goes on.
    pub(crate) fn deaf(target: SocketAddr, tamper: Tamper, is_deaf: Arc<AtomicBool>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let tamper = Arc::new(Mutex::new(tamper));
        let data = Arc::<DataConnections>::default();
        let opened = Arc::clone(&data);
        thread::spawn(move || {
            for down in listener.incoming() {
                let (down, tamper) = (down.unwrap(), Arc::clone(&tamper));
                let (is_deaf, opened) = (Arc::clone(&is_deaf), Arc::clone(&opened));
                thread::spawn(move || relay(down, target, &tamper, is_deaf, &opened));
            }
        });
        Self { addr, data }
    }

    /// The server loses the data connections that there are, and the consumer does not notice. How many they were.
    pub(crate) fn sever(&self) -> usize {
        let data = std::mem::take(&mut *self.data.lock().unwrap());
        for (up, is_severed) in &data {
            is_severed.store(true, Ordering::SeqCst);
            up.shutdown(Shutdown::Both).unwrap();
        }
        data.len()
    }

    /// The same lease, to be fetched through the proxy.
    pub(crate) fn divert(&self, params: &KvTransferParams) -> KvTransferParams {
        KvTransferParams {
            remote_port: self.addr.port(),
            ..params.clone()
        }
    }
}

fn relay(
    mut down: TcpStream,
    target: SocketAddr,
    tamper: &Arc<Mutex<Tamper>>,
    is_deaf: Arc<AtomicBool>,
    data: &DataConnections,
) {
    let mut preface = [0; PREFACE_LEN];
    let Ok(()) = down.read_exact(&mut preface) else {
        return;
    };
    let Ok(mut up) = TcpStream::connect(target) else {
        return;
    };
    up.write_all(&preface).unwrap();
    let (mut from_down, mut to_up) = (down.try_clone().unwrap(), up.try_clone().unwrap());
    thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(n @ 1..) = from_down.read(&mut bytes) {
            if !is_deaf.load(Ordering::SeqCst) && to_up.write_all(&bytes[..n]).is_err() {
                break;
            }
        }
        let _ = to_up.shutdown(Shutdown::Both);
    });
    match decode_preface(&preface).map(|p| p.role) {
        Ok(Role::Data) => {
            let is_severed = Arc::<AtomicBool>::default();
            let open = (up.try_clone().unwrap(), Arc::clone(&is_severed));
            data.lock().unwrap().push(open);
            drop(relay_chunks(&mut up, &mut down, tamper));
            if is_severed.load(Ordering::SeqCst) {
                // Until the consumer closes it.
                let _ = down.read(&mut [0]);
            }
        }
        _ => drop(std::io::copy(&mut up, &mut down)),
    }
    let _ = down.shutdown(Shutdown::Both);
    let _ = up.shutdown(Shutdown::Both);
}

fn relay_chunks(
    up: &mut TcpStream,
    down: &mut TcpStream,
    tamper: &Mutex<Tamper>,
) -> std::io::Result<()> {
    let mut attached = [0; FRAME_HEADER_LEN];
    up.read_exact(&mut attached)?;
    let mut body = vec![0; decode_frame_header(&attached, MAX_BODY).unwrap().len as usize];
    up.read_exact(&mut body)?;
    down.write_all(&[&attached[..], &body].concat())?;
    loop {
        let mut wire = vec![0; CHUNK_HEADER_LEN];
        up.read_exact(&mut wire)?;
        let header = decode_chunk_header(&wire).unwrap();
        wire.resize(CHUNK_HEADER_LEN + header.len as usize, 0);
        up.read_exact(&mut wire[CHUNK_HEADER_LEN..])?;
        let fate = tamper.lock().unwrap()(&header, wire);
        match fate {
            Fate::Forward(wire) => down.write_all(&wire)?,
            Fate::Cut => return Ok(()),
            Fate::Stall => {
                // Until the consumer has had enough.
                let _ = down.read(&mut [0]);
                return Ok(());
            }
        }
    }
}
