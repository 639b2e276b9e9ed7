//! Servers to ask, and what to ask them with.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use baton_engine::{Beside, EngineConfig, PrefixCaching};
use baton_http::Client;
use baton_kv_events::{Feed, Publisher};
use baton_kv_transfer::{KvClient, KvClientConfig, KvServer, KvServerConfig, Secret};
use baton_server::{GenerationDefaults, ModelCard, Parts, Role, ServerConfig, ServerError};
use baton_sim::{Pace, SimConfig, SimRunner};
use baton_text::{ChatTemplate, Tokenizer};
use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const TEMPLATE: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}\
    {% if add_generation_prompt %}<assistant>{% endif %}";

/// What a server is started with.
pub(crate) struct Setup {
    pub(crate) config: ServerConfig,
    pub(crate) sim: SimConfig,
    pub(crate) pace: Option<Pace>,
    pub(crate) max_num_seqs: usize,
    pub(crate) max_waiting: usize,
    pub(crate) kv_events: Option<(Publisher, Feed)>,
}

impl Setup {
    pub(crate) fn role(role: Role) -> Self {
        Self {
            config: ServerConfig {
                role,
                prompt_tokens_details: true,
                ..ServerConfig::default()
            },
            sim: SimConfig {
                eos: Some((0, 64)),
                ..SimConfig::default()
            },
            pace: None,
            max_num_seqs: 8,
            max_waiting: 256,
            kv_events: None,
        }
    }

    /// A device that needs some time for every step.
    pub(crate) fn slow(mut self) -> Self {
        self.pace = Some(Box::new(|_| std::thread::sleep(Duration::from_millis(3))));
        self
    }

    /// A device that never ends by itself.
    pub(crate) fn endless(mut self) -> Self {
        self.sim.eos = None;
        self
    }
}

/// A running server.
pub(crate) struct Server {
    pub(crate) addr: SocketAddr,
    pub(crate) shutdown: CancellationToken,
    pub(crate) task: JoinHandle<Result<(), ServerError>>,
    client: Client,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

impl Server {
    pub(crate) async fn start(setup: Setup) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let (config, parts) = setup.parts();
        let task = tokio::spawn(baton_server::run(listener, config, parts, shutdown.clone()));
        Self {
            addr,
            shutdown,
            task,
            client: Client::default(),
        }
    }

    pub(crate) async fn send(&self, request: Request<Full<Bytes>>) -> http::Response<Incoming> {
        self.client.send(request).await.unwrap()
    }

    pub(crate) fn request(&self, path: &str) -> http::request::Builder {
        Request::post(format!("http://{}{path}", self.addr))
            .header("content-type", "application/json")
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> Reply {
        self.post_with(path, body, &[]).await
    }

    pub(crate) async fn post_with(
        &self,
        path: &str,
        body: Value,
        headers: &[(&str, &str)],
    ) -> Reply {
        let mut request = self.request(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let body = Full::new(Bytes::from(body.to_string()));
        Reply::read(self.send(request.body(body).unwrap()).await).await
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        let request = Request::get(format!("http://{}{path}", self.addr));
        Reply::read(self.send(request.body(Full::default()).unwrap()).await).await
    }

    /// Sum of a metric's series.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        self.metric_of(name, "").await
    }

    /// Sum of a metric's series that have a label, written `name="value"`.
    pub(crate) async fn metric_of(&self, name: &str, label: &str) -> f64 {
        let text = self.get("/metrics").await.text();
        let series = text.lines().filter(|l| {
            l.starts_with(name) && l[name.len()..].starts_with(['{', ' ']) && l.contains(label)
        });
        series
            .map(|l| l.rsplit(' ').next().unwrap().parse::<f64>().unwrap())
            .sum()
    }

    /// Waits until a metric has a value.
    pub(crate) async fn until(&self, name: &str, is_so: impl Fn(f64) -> bool) {
        let is_so = async || is_so(self.metric(name).await);
        until(name, is_so).await;
    }

    /// Waits until no request is being answered.
    pub(crate) async fn until_idle(&self) {
        let is_idle = async || self.get("/load").await.json()["server_load"] == 0;
        until("idleness", is_idle).await;
    }
}

async fn until(what: &str, is_so: impl AsyncFn() -> bool) {
    let wait = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), wait)
        .await
        .unwrap_or_else(|_| panic!("{what} never came"));
}

impl Setup {
    fn parts(self) -> (ServerConfig, Parts) {
        let layout = self.sim.spec.layout.clone();
        let secret = || Secret::new(b"a secret of at least thirty-two bytes").unwrap();
        let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
        let role = self.config.role;
        let kv_server = role.exports().then(|| {
            let mut config = KvServerConfig::new(any_port, secret(), layout.clone());
            config.pool_bytes = self.config.kv_host_pool;
            KvServer::start(config).unwrap()
        });
        let kv_client = role
            .imports()
            .then(|| KvClient::new(KvClientConfig::new(secret(), layout, 64 << 20)).unwrap());
        let runner = match self.pace {
            Some(pace) => SimRunner::paced(self.sim, pace),
            None => SimRunner::new(self.sim),
        };
        let parts = Parts {
            runner: Box::new(runner),
            engine: EngineConfig {
                prefill_beside_decode: Beside::Tokens(usize::MAX),
                export_tail: 16,
                max_num_seqs: self.max_num_seqs,
                max_num_batched_tokens: 256,
                max_waiting: self.max_waiting,
                prefix_caching: PrefixCaching::On,
                hash_seed: "0".into(),
                log_cache_changes: false,
            },
            tokenizer: Arc::new(tokenizer()),
            chat_template: Some(ChatTemplate::new(TEMPLATE, "", "").unwrap()),
            card: ModelCard {
                served_names: vec!["smollm2".into(), "alias".into()],
                root: "/models/smollm2".into(),
                max_model_len: 2048,
                eos: Box::new([0]),
                defaults: GenerationDefaults::default(),
            },
            kv_server,
            kv_client,
            kv_events: self.kv_events,
        };
        (self.config, parts)
    }
}

/// Asks, and returns the answer when its head is there.
pub(crate) async fn begin(server: &Server, path: &str, body: &Value) -> http::Response<Incoming> {
    let body = Full::new(Bytes::from(body.to_string()));
    let request = server.request(path).body(body);
    server.send(request.unwrap()).await
}

/// An answer, read to its end.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Reply {
    pub(crate) async fn read(response: http::Response<Incoming>) -> Self {
        let (head, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        Self {
            status: head.status,
            headers: head.headers,
            body,
        }
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.to_vec()).unwrap()
    }

    /// The document of a successful answer.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        assert_eq!(self.status, StatusCode::OK, "{}", self.text());
        serde_json::from_slice(&self.body).unwrap()
    }

    /// The events of a stream that ended well.
    #[track_caller]
    pub(crate) fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, StatusCode::OK, "{}", self.text());
        assert_eq!(
            self.headers["content-type"],
            "text/event-stream; charset=utf-8"
        );
        let text = self.text();
        let text = text
            .strip_suffix("data: [DONE]\n\n")
            .expect("a stream ends with [DONE]");
        let events = text
            .split_terminator("\n\n")
            .map(|e| e.strip_prefix("data: ").unwrap());
        events.map(|e| serde_json::from_str(e).unwrap()).collect()
    }
}

/// The texts of a stream's choices, put together.
pub(crate) fn streamed_texts(events: &[Value], n: usize) -> Vec<String> {
    let mut texts = vec![String::new(); n];
    for choice in events.iter().flat_map(|e| e["choices"].as_array().unwrap()) {
        let text = choice
            .get("text")
            .or_else(|| choice["delta"].get("content"))
            .unwrap();
        texts[choice["index"].as_u64().unwrap() as usize].push_str(text.as_str().unwrap());
    }
    texts
}

/// The texts of an answer's choices.
pub(crate) fn texts(answer: &Value) -> Vec<String> {
    let choices = answer["choices"].as_array().unwrap().iter();
    let text = |c: &Value| {
        c.get("text")
            .unwrap_or(&c["message"]["content"])
            .as_str()
            .unwrap()
            .to_owned()
    };
    choices.map(text).collect()
}

/// 256 tokens of one byte each, and one long one, so that texts of many characters may be few tokens.
fn tokenizer() -> Tokenizer {
    let is_printable = |b: u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut next = 0x100;
    let mut vocab = serde_json::Map::new();
    for byte in 0..256u32 {
        let code = if is_printable(byte) {
            byte
        } else {
            (next, next += 1).0
        };
        vocab.insert(char::from_u32(code).unwrap().to_string(), byte.into());
    }
    let long = json!({"id": 256, "content": "~".repeat(81), "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": false});
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [long], "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}
    });
    Tokenizer::from_json(json.to_string().as_bytes()).unwrap()
}
