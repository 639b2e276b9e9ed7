//! A world in which scenarios are played.

use baton_kv::{BlockEvent, EngineHash, Medium, Stored};
use baton_scheduler::config::load;
use baton_scheduler::{
    Adapters, Decision, Endpoint, EndpointId, Explanation, Health, Identity, Load, Prefill,
    PrefixIndex, Prompt, PromptHasher, Request, Role, Scheduler, TokenHasher, TokenPrompt,
    Unschedulable,
};
use std::time::Duration;

fn token_hasher() -> TokenHasher {
    TokenHasher::new(2)
}

/// Four bytes are a token.
fn tokens(text: &str) -> Vec<u32> {
    let bytes = bytes(text);
    let token = |word: &[u8]| u32::from_le_bytes(word.try_into().unwrap());
    bytes.chunks_exact(4).map(token).collect()
}

/// `TEXT*N` is the word TEXT repeated to N tokens.
fn bytes(text: &str) -> Vec<u8> {
    let (word, tokens) = text.split_once('*').unwrap();
    let n = 4 * tokens.parse::<usize>().unwrap();
    word.bytes().cycle().take(n).collect()
}

struct World {
    names: Vec<String>,
    fleet: Vec<Endpoint>,
    scheduler: Scheduler,
    hasher: PromptHasher,
    why: Explanation,
}

impl World {
    fn new(yaml: &str) -> Self {
        let value = serde_norway::from_str(yaml).unwrap();
        let plan = load(&value).unwrap_or_else(|e| panic!("{e}")).plan;
        let precise = plan.precise_index(token_hasher());
        let hasher = PromptHasher::new(1).with_blocks(&plan.approximate);
        let mut scheduler = Scheduler::new(plan, PrefixIndex::new(100_000));
        if let Some(index) = precise {
            scheduler = scheduler.with_precise(index);
        }
        Self {
            names: Vec::new(),
            fleet: Vec::new(),
            hasher,
            scheduler,
            why: Explanation::default(),
        }
    }

    fn id(&self, name: &str) -> EndpointId {
        let at = self.names.iter().position(|n| n == name);
        EndpointId(u32::try_from(at.unwrap_or_else(|| panic!("no endpoint {name}"))).unwrap())
    }

    fn ids(&self, names: &str) -> Vec<EndpointId> {
        names
            .split(',')
            .filter(|n| *n != "-")
            .map(|n| self.id(n))
            .collect()
    }

    fn prompt(&self, text: &str) -> Prompt {
        let bytes = bytes(text);
        self.hasher.prompt("m", &[&bytes], None)
    }

    /// A server says that it has this prompt, in blocks of 64 tokens.
    fn reports(&mut self, name: &str, text: &str, host: bool) {
        let mut stored = Stored {
            tokens: tokens(text),
            block_size: 64,
            medium: if host { Medium::Host } else { Medium::Device },
            ..Stored::default()
        };
        let prefixes = (1..=stored.tokens.len() / 64).map(|n| &stored.tokens[..64 * n]);
        let hash = |prefix: &[u32]| {
            let mix = |h: u64, t: &u32| h.rotate_left(7).wrapping_mul(31) ^ u64::from(*t);
            EngineHash(prefix.iter().fold(7, mix))
        };
        stored.hashes = prefixes.map(hash).collect();
        let id = self.id(name);
        let index = self.scheduler.precise().unwrap();
        index.apply(id, "m", &BlockEvent::Stored(stored));
    }

    fn set(&mut self, name: &str, role: &str, words: &[&str]) {
        if !self.names.iter().any(|n| n == name) {
            self.names.push(name.to_owned());
        }
        let id = self.id(name);
        let role = Role::of_label(Some(role).filter(|r| *r != "-"));
        let mut endpoint = Endpoint::new(id, role);
        let mut labels = Vec::new();
        let mut words = words.iter();
        while let Some(&word) = words.next() {
            let mut value = || *words.next().unwrap();
            let load: &mut Load = &mut endpoint.load;
            match word {
                "waiting" => load.waiting = value().parse().unwrap(),
                "running" => load.running = value().parse().unwrap(),
                "active" => load.active = value().parse().unwrap(),
                "tokens" => load.tokens = value().parse().unwrap(),
                "work" => load.queued_work = value().parse().unwrap(),
                "pace" => load.pace = Some(value().parse().unwrap()),
                "kv" => load.kv_usage = value().parse().unwrap(),
                "stale" => load.fresh = false,
                "down" => endpoint.health = Health::Unreachable,
                "label" => {
                    let (key, value) = value().split_once('=').unwrap();
                    labels.push((key.into(), value.into()));
                }
                "loras" => {
                    let lists: Vec<&str> = value().split('/').collect();
                    let list = |i: usize| {
                        lists[i]
                            .split(',')
                            .filter(|n| !n.is_empty())
                            .map(Into::into)
                            .collect()
                    };
                    endpoint.adapters = Some(
                        Adapters {
                            running: list(0),
                            waiting: list(1),
                            most: lists[2].parse().unwrap(),
                        }
                        .into(),
                    );
                }
                other => panic!("what is {other}?"),
            }
        }
        endpoint.identity = Identity::new(format!("ns/{name}"), labels).into();
        self.fleet.retain(|e| e.id != id);
        self.fleet.push(endpoint);
    }

    fn show(&self, decided: Result<&Decision, Unschedulable>) -> String {
        let name = |id: EndpointId| self.names[id.0 as usize].as_str();
        let d = match decided {
            Err(Unschedulable::UnknownModel) => return "unknown model".to_owned(),
            Err(Unschedulable::NoneHealthy) => return "nobody".to_owned(),
            Err(Unschedulable::Saturated) => return "busy".to_owned(),
            Err(Unschedulable::NoPrefill) => return "no prefill".to_owned(),
            Err(Unschedulable::NotCached) => return "not cached".to_owned(),
            Ok(d) => d,
        };
        let mut text = name(d.decode).to_owned();
        for other in &d.others {
            text += &format!(", then {}", name(*other));
        }
        for encoder in &d.encode {
            text += &format!(" & {}", name(*encoder));
        }
        match d.prefill {
            Prefill::NotWorthIt => {}
            Prefill::SameServer => text += " itself",
            Prefill::NoneHealthy => text += ", no prefill server",
            Prefill::At(p, _) => text += &format!(" + {}", name(p)),
        }
        if let Some(port) = d.primary_port {
            text += &format!(" by {port}");
        }
        text
    }

    fn ask(&mut self, question: &str) -> String {
        let (question, sent) = match question.strip_suffix(" and sent") {
            Some(question) => (question, true),
            None => (question, false),
        };
        let words: Vec<&str> = question.split_whitespace().collect();
        let prompt = self.prompt(words[0]);
        let mut request = Request::new(&prompt);
        let (mut avoid, mut subset, mut selection, mut turn) = (vec![], None, None, 0);
        for pair in words[1..].chunks(2) {
            match pair[0] {
                "model" => request.model = Some(pair[1]),
                "target" => request.target = Some(pair[1]),
                "avoid" => avoid = self.ids(pair[1]),
                "subset" => subset = Some(self.ids(pair[1])),
                "selection" => selection = Some(self.ids(pair[1])),
                "session" => request.session_endpoint = Some(pair[1]),
                "chat" => request.session = Some(self.hasher.session(pair[1])),
                "multimodal" => request.multimodal = pair[1] == "yes",
                "if" => request.if_cached = pair[1] == "cached",
                "turn" => turn = pair[1].parse().unwrap(),
                "at" => request.now = Duration::from_secs(pair[1].parse().unwrap()),
                other => panic!("what is {other}?"),
            }
        }
        let tokens = tokens(words[0]);
        let keys = self.scheduler.precise().map(|index| {
            let prompt = TokenPrompt {
                model: "m",
                tokens: &tokens,
                ..TokenPrompt::default()
            };
            token_hasher().keys(&prompt, index.block_sizes())
        });
        request.keys = keys.as_ref();
        request.avoid = &avoid;
        request.subset = subset.as_deref();
        request.selection = selection.as_deref();
        self.why = Explanation::default();
        let explained = self
            .scheduler
            .decide_observed(&self.fleet, &request, turn, &mut self.why);
        let decided = self.scheduler.decide(&self.fleet, &request, turn);
        assert_eq!(explained, decided, "an explanation changes nothing");
        if let (Ok(decision), true) = (&decided, sent) {
            self.scheduler.sent(&request, decision);
        }
        self.show(decided.as_ref().map_err(|e| *e))
    }

    fn why(&self, profile: &str, name: &str) -> String {
        let stage = self.why.stages.iter().find(|s| *s.profile == *profile);
        let stage = stage.unwrap_or_else(|| panic!("profile {profile} did not run"));
        let id = self.id(name);
        let Some(candidate) = stage.candidates.iter().find(|c| c.id == id) else {
            return "no candidate".to_owned();
        };
        if let Some(filter) = &candidate.dropped_by {
            return format!("dropped by {filter}");
        }
        let values: Vec<String> = (stage.scorers.iter().zip(&candidate.values))
            .map(|((name, _), value)| format!("{name} {}", round(*value)))
            .collect();
        format!("{} = {}", values.join(", "), round(candidate.total))
    }
}

/// Three digits, as few as needed.
fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// Plays `scenario` under the configuration `yaml`.
pub(crate) fn check(yaml: &str, scenario: &str) {
    let mut world = World::new(yaml);
    for line in scenario.lines().map(str::trim).filter(|l| !l.is_empty()) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let expected = line.split_once(" => ");
        let found = match words[0] {
            "has" => {
                let (prompt, id) = (world.prompt(words[2]), world.id(words[1]));
                world.scheduler.answered(&prompt, id);
                continue;
            }
            "reports" => {
                world.reports(words[1], words[2], words.get(3) == Some(&"host"));
                continue;
            }
            "ask" => world.ask(&expected.unwrap().0[4..]),
            "why" => world.why(words[1], words[2]),
            name => {
                world.set(name, words[1], &words[2..]);
                continue;
            }
        };
        assert_eq!(found, expected.unwrap().1, "in {line:?} of\n{scenario}");
    }
}
