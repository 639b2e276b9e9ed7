//! The standard variables: where the collector is, and what is told it. Pure: the environment is an argument.

use crate::sampler::Sampler;
use http::header::{HeaderName, HeaderValue};
use http::uri::{PathAndQuery, Scheme, Uri};
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// Who speaks, unless it is said.
const SERVICE: &str = "llm-d-router/epp";
/// Most spans that wait, whatever is said.
const MOST_WAITING: usize = 1 << 16;
const DAY: Duration = Duration::from_secs(86_400);

/// How traces are made and where they go.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Which traces.
    pub sampler: Sampler,
    /// What is said of this process.
    pub resource: Vec<(String, String)>,
    /// Where they go.
    pub collector: Collector,
    /// Most spans that wait to be sent.
    pub most_waiting: usize,
    /// Most spans of a message.
    pub most_at_once: usize,
    /// Longest wait before spans are sent.
    pub delay: Duration,
}

/// How the collector is reached.
#[derive(Clone, PartialEq)]
pub struct Collector {
    /// With the path.
    pub uri: Uri,
    /// How it is spoken to.
    pub protocol: Protocol,
    /// What every message carries; there may be a secret among them.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// Longest wait for an answer.
    pub timeout: Duration,
    /// Whose certificates count, PEM; otherwise the system's roots.
    pub roots: Option<PathBuf>,
}

impl fmt::Debug for Collector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Collector")
            .field("uri", &self.uri)
            .field("protocol", &self.protocol)
            .finish_non_exhaustive()
    }
}

/// What OTLP travels in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// gRPC.
    Grpc,
    /// Protobuf in HTTP/1.1.
    Http,
}

/// A variable that makes no sense. Values are not shown: they may be secrets.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{variable}: {why}")]
pub struct SettingsError {
    /// Which.
    pub variable: &'static str,
    /// What is known of it.
    pub why: &'static str,
}

impl Settings {
    /// What the variables say that `get` looks up; `None` if they turn traces off.
    ///
    /// # Errors
    /// The first variable that makes no sense.
    pub fn read(get: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, SettingsError> {
        // A variable that is empty counts as unset, as the standard says.
        let get = |name: &'static str| get(name).filter(|value| !value.trim().is_empty());
        let off = get("OTEL_SDK_DISABLED").is_some_and(|v| v.eq_ignore_ascii_case("true"));
        match get("OTEL_TRACES_EXPORTER").as_deref().unwrap_or("otlp") {
            _ if off => return Ok(None),
            "otlp" => {}
            // Nobody reads spans on a console here.
            "none" | "console" => return Ok(None),
            _ => return wrong("OTEL_TRACES_EXPORTER", "this is otlp, none or console"),
        }
        Ok(Some(Self {
            sampler: sampler(&get)?,
            resource: resource(&get)?,
            collector: collector(&get)?,
            most_waiting: number(&get, "OTEL_BSP_MAX_QUEUE_SIZE", 2048)?.clamp(1, MOST_WAITING),
            most_at_once: number(&get, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512)?.clamp(1, 4096),
            delay: millis(&get, "OTEL_BSP_SCHEDULE_DELAY", 5000)?,
        }))
    }
}

fn wrong<T>(variable: &'static str, why: &'static str) -> Result<T, SettingsError> {
    Err(SettingsError { variable, why })
}

type Get<'a> = &'a dyn Fn(&'static str) -> Option<String>;

fn number(get: Get<'_>, variable: &'static str, usual: usize) -> Result<usize, SettingsError> {
    match get(variable).map(|text| text.trim().parse()) {
        None => Ok(usual),
        Some(Ok(number)) => Ok(number),
        Some(Err(_)) => wrong(variable, "this is no whole number"),
    }
}

fn millis(get: Get<'_>, variable: &'static str, usual: usize) -> Result<Duration, SettingsError> {
    let millis = number(get, variable, usual)?;
    Ok(Duration::from_millis(millis as u64).min(DAY))
}

fn sampler(get: Get<'_>) -> Result<Sampler, SettingsError> {
    const NAME: &str = "OTEL_TRACES_SAMPLER";
    const ARGUMENT: &str = "OTEL_TRACES_SAMPLER_ARG";
    let usual = Sampler::default();
    let ratio = match get(ARGUMENT).map(|text| text.trim().parse::<f64>()) {
        None => usual.ratio,
        Some(Ok(ratio)) if (0.0..=1.0).contains(&ratio) => ratio,
        Some(_) => return wrong(ARGUMENT, "this is a number from 0 to 1"),
    };
    let name = get(NAME);
    let name = name.as_deref().unwrap_or("parentbased_traceidratio");
    let sampler = Sampler::named(name.trim(), ratio);
    let why = "this is always_on, always_off or traceidratio, or one of them after parentbased_";
    sampler.map_or_else(|| wrong(NAME, why), Ok)
}

fn resource(get: Get<'_>) -> Result<Vec<(String, String)>, SettingsError> {
    const NAME: &str = "OTEL_RESOURCE_ATTRIBUTES";
    let mut said = match pairs(&get(NAME).unwrap_or_default()) {
        Some(pairs) => pairs,
        None => return wrong(NAME, "these are no key=value with commas between"),
    };
    let named = get("OTEL_SERVICE_NAME");
    if named.is_some() || !said.iter().any(|(key, _)| key == "service.name") {
        said.retain(|(key, _)| key != "service.name");
        let name = named.unwrap_or_else(|| SERVICE.to_owned());
        said.push(("service.name".to_owned(), name));
    }
    Ok(said)
}

/// `key=value` with commas between; what would be taken for one of those is written `%2C`.
fn pairs(text: &str) -> Option<Vec<(String, String)>> {
    let texts = text.split(',').map(str::trim).filter(|t| !t.is_empty());
    let pair = |text: &str| {
        let (key, value) = text.split_once('=')?;
        let (key, value) = (key.trim(), decoded(value.trim())?);
        (!key.is_empty()).then(|| (key.to_owned(), value))
    };
    texts.map(pair).collect()
}

fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        rest = after;
        if first != b'%' {
            bytes.push(first);
            continue;
        }
        let (digits, after) = rest.split_at_checked(2)?;
        let digits = std::str::from_utf8(digits).ok()?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        rest = after;
    }
    String::from_utf8(bytes).ok()
}

fn collector(get: Get<'_>) -> Result<Collector, SettingsError> {
    // Of each there is one for traces alone.
    let either = |names: [&'static str; 2]| {
        let found = names.into_iter().find_map(|n| get(n).map(|v| (n, v)));
        found.map(|(name, value)| (name, value.trim().to_owned()))
    };
    let said = either([
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
        "OTEL_EXPORTER_OTLP_PROTOCOL",
    ]);
    let protocol = protocol(said.as_ref())?;
    let headers = either([
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
        "OTEL_EXPORTER_OTLP_HEADERS",
    ]);
    let (variable, timeout) = match either([
        "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT",
        "OTEL_EXPORTER_OTLP_TIMEOUT",
    ]) {
        Some((name, value)) => (name, Some(value)),
        None => ("OTEL_EXPORTER_OTLP_TIMEOUT", None),
    };
    Ok(Collector {
        uri: endpoint(get, protocol)?,
        protocol,
        headers: headers.map_or(Ok(Vec::new()), |(name, text)| fields(name, &text))?,
        timeout: millis(&|_| timeout.clone(), variable, 10_000)?,
        roots: either([
            "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE",
            "OTEL_EXPORTER_OTLP_CERTIFICATE",
        ])
        .map(|(_, path)| path.into()),
    })
}

fn protocol(said: Option<&(&'static str, String)>) -> Result<Protocol, SettingsError> {
    match said.map(|(name, value)| (*name, &**value)) {
        None | Some((_, "grpc")) => Ok(Protocol::Grpc),
        Some((_, "http/protobuf")) => Ok(Protocol::Http),
        Some((variable, _)) => wrong(variable, "this is grpc, or http/protobuf"),
    }
}

fn fields(
    variable: &'static str,
    text: &str,
) -> Result<Vec<(HeaderName, HeaderValue)>, SettingsError> {
    let field = |(key, value): (String, String)| {
        let mut value = HeaderValue::try_from(value).ok()?;
        value.set_sensitive(true);
        Some((HeaderName::try_from(key).ok()?, value))
    };
    let fields = pairs(text).and_then(|pairs| pairs.into_iter().map(field).collect());
    fields.map_or_else(|| wrong(variable, "these are no headers"), Ok)
}

/// The whole address. An endpoint for traces alone has its path; a common one gets it.
fn endpoint(get: Get<'_>, protocol: Protocol) -> Result<Uri, SettingsError> {
    const OWN: &str = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
    const COMMON: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
    const GRPC: &str = "/opentelemetry.proto.collector.trace.v1.TraceService/Export";
    let usual = match protocol {
        Protocol::Grpc => "http://localhost:4317",
        Protocol::Http => "http://localhost:4318",
    };
    let (variable, text) = match (get(OWN), get(COMMON)) {
        (Some(own), _) => (OWN, own),
        (None, Some(common)) => (COMMON, common),
        (None, None) => (COMMON, usual.to_owned()),
    };
    let text = text.trim();
    // For gRPC a name and a port are enough.
    let whole = match text.contains("://") {
        true => text.to_owned(),
        false => format!("http://{text}"),
    };
    let why = "this is no address such as http://collector:4317";
    let Ok(uri) = whole.parse::<Uri>() else {
        return wrong(variable, why);
    };
    let path = match (protocol, variable) {
        (Protocol::Grpc, _) => GRPC.to_owned(),
        (Protocol::Http, OWN) => uri.path().to_owned(),
        (Protocol::Http, _) => format!("{}/v1/traces", uri.path().trim_end_matches('/')),
    };
    let known = [Some(&Scheme::HTTP), Some(&Scheme::HTTPS)].contains(&uri.scheme());
    let mut parts = uri.into_parts();
    parts.path_and_query = PathAndQuery::try_from(path).ok();
    match Uri::from_parts(parts) {
        Ok(uri) if known && uri.authority().is_some() => Ok(uri),
        _ => wrong(variable, why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(said: &[(&str, &str)]) -> Result<Option<Settings>, SettingsError> {
        Settings::read(|name| {
            let found = said.iter().find(|(n, _)| *n == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    fn settings(said: &[(&str, &str)]) -> Settings {
        read(said).unwrap().unwrap()
    }

    #[test]
    fn without_variables_it_is_what_the_picker_of_llm_d_does() {
        let usual = settings(&[]);
        let grpc =
            "http://localhost:4317/opentelemetry.proto.collector.trace.v1.TraceService/Export";
        assert_eq!(usual.collector.uri, grpc);
        assert_eq!((usual.sampler.ratio, usual.sampler.by_parent), (0.1, true));
        assert_eq!(usual.resource, [("service.name".into(), SERVICE.into())]);
        assert_eq!((usual.most_waiting, usual.most_at_once), (2048, 512));
    }

    #[test]
    fn an_address_gets_the_path_that_it_lacks() {
        const HTTP: (&str, &str) = ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf");
        const COMMON: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
        const OWN: &str = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
        for (said, uri) in [
            (vec![HTTP], "http://localhost:4318/v1/traces"),
            (
                vec![HTTP, (COMMON, "https://c/base/")],
                "https://c/base/v1/traces",
            ),
            (
                vec![HTTP, (COMMON, "https://c"), (OWN, "http://d:1/x")],
                "http://d:1/x",
            ),
            (vec![HTTP, (OWN, "http://d:1")], "http://d:1/"),
            (
                vec![(COMMON, "c:4317")],
                "http://c:4317/opentelemetry.proto.collector.trace.v1.TraceService/Export",
            ),
        ] {
            assert_eq!(settings(&said).collector.uri, uri, "{said:?}");
        }
    }

    #[test]
    fn what_is_told_is_read_as_the_standard_has_it() {
        let said = settings(&[
            (
                "OTEL_RESOURCE_ATTRIBUTES",
                "service.name=a, k8s.pod.name=x%2Cy",
            ),
            (
                "OTEL_EXPORTER_OTLP_HEADERS",
                "authorization=Bearer%20s3cret",
            ),
            ("OTEL_TRACES_SAMPLER", "always_on"),
            ("OTEL_BSP_SCHEDULE_DELAY", "200"),
            ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "3"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "x"),
        ]);
        let pair = |k: &str, v: &str| (k.to_owned(), v.to_owned());
        let resource = [pair("service.name", "a"), pair("k8s.pod.name", "x,y")];
        assert_eq!(said.resource, resource);
        assert_eq!(said.collector.headers[0].1, "Bearer s3cret");
        assert_eq!(said.collector.timeout, Duration::from_millis(3));
        assert_eq!((said.sampler.ratio, said.delay.as_millis()), (1.0, 200));
        assert!(!format!("{said:?}").contains("s3cret"));
        let named = settings(&[
            ("OTEL_RESOURCE_ATTRIBUTES", "service.name=a"),
            ("OTEL_SERVICE_NAME", "b"),
        ]);
        assert_eq!(named.resource, [pair("service.name", "b")]);
    }

    #[test]
    fn it_can_be_turned_off_and_says_what_makes_no_sense() {
        assert_eq!(read(&[("OTEL_SDK_DISABLED", "true")]), Ok(None));
        assert_eq!(read(&[("OTEL_TRACES_EXPORTER", "none")]), Ok(None));
        for (variable, value) in [
            ("OTEL_TRACES_EXPORTER", "zipkin"),
            ("OTEL_TRACES_SAMPLER", "sometimes"),
            ("OTEL_TRACES_SAMPLER_ARG", "2"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "ftp://c"),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "k ey=v"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon"),
            ("OTEL_RESOURCE_ATTRIBUTES", "alone"),
            ("OTEL_RESOURCE_ATTRIBUTES", "k=%f"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "-1"),
        ] {
            let error = read(&[(variable, value)]).unwrap_err();
            assert_eq!(error.variable, variable);
        }
    }
}
