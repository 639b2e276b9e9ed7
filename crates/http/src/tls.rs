//! TLS for client and server: who a server is, whom a client trusts.
//!
//! TLS 1.2 and 1.3 with ring's cryptography; HTTP/1.1 inside, or HTTP/2. A server's certificate can be replaced while it
//! serves. Not here: which certificate, and where it lies.

use crate::any_name;
use arc_swap::ArcSwap;
use http::Uri;
use hyper_util::client::legacy::connect::{Connected, Connection, HttpConnector};
use hyper_util::rt::TokioIo;
use rustls::client::WantsClientCert;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, ConfigBuilder, RootCertStore, ServerConfig, crypto::CryptoProvider};
use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};
use tower_service::Service;

/// Longest wait for a peer to finish its handshake.
pub(crate) const HANDSHAKE: Duration = Duration::from_secs(10);

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Not PEM, or not what was expected in it.
    #[error("no usable PEM: {0}")]
    Pem(#[from] rustls::pki_types::pem::Error),
    /// Certificate and key do not make sense, or not together.
    #[error("no usable certificate: {0}")]
    Certificate(#[from] rustls::Error),
    /// No certificate could be made.
    #[error("cannot make a certificate: {0}")]
    Make(#[from] rcgen::Error),
    /// The system trusts nobody.
    #[error("this system has no trusted root certificates")]
    NoRoots,
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Who a server is: certificate chain and key. Clones share it, so that replacing one replaces all.
#[derive(Clone)]
pub struct Identity {
    config: Arc<ArcSwap<ServerConfig>>,
    /// The protocol inside, as ALPN names it.
    inside: &'static [u8],
}

const HTTP_1: &[u8] = b"http/1.1";
#[cfg(feature = "http2")]
const HTTP_2: &[u8] = b"h2";

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Identity(***)")
    }
}

impl Identity {
    /// A fresh certificate for `localhost`, signed by its own key: nobody can verify it, it only encrypts.
    ///
    /// # Errors
    /// [`TlsError::Make`] if the system has no randomness.
    pub fn self_signed() -> Result<Self, TlsError> {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()])?;
        let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
        let config = server_config(vec![made.cert.der().clone()], key.into(), HTTP_1)?;
        Ok(Self::of(config))
    }

    /// From a certificate chain, leaf first, and its key, both PEM.
    ///
    /// # Errors
    /// See [`TlsError`].
    pub fn from_pem(chain: &[u8], key: &[u8]) -> Result<Self, TlsError> {
        Ok(Self::of(parse(chain, key, HTTP_1)?))
    }

    fn of(config: ServerConfig) -> Self {
        Self {
            config: Arc::new(ArcSwap::from_pointee(config)),
            inside: HTTP_1,
        }
    }

    /// The same, for a server that speaks HTTP/2 and nothing else. It is no longer shared with what it came from.
    #[cfg(feature = "http2")]
    #[must_use]
    pub fn for_http2(self) -> Self {
        let mut config = ServerConfig::clone(&self.config.load());
        config.alpn_protocols = vec![HTTP_2.to_vec()];
        Self {
            config: Arc::new(ArcSwap::from_pointee(config)),
            inside: HTTP_2,
        }
    }

    /// Connections accepted from now on see this certificate. On an error the old one stays.
    ///
    /// # Errors
    /// See [`TlsError`].
    pub fn replace_pem(&self, chain: &[u8], key: &[u8]) -> Result<(), TlsError> {
        self.config.store(Arc::new(parse(chain, key, self.inside)?));
        Ok(())
    }

    pub(crate) async fn accept(&self, stream: TcpStream) -> io::Result<Secured> {
        let acceptor = TlsAcceptor::from(self.config.load_full());
        let handshake = async { acceptor.accept(any_name::begin(stream).await?).await };
        tokio::time::timeout(HANDSHAKE, handshake).await?
    }
}

/// A client's connection after the handshake.
pub(crate) type Secured = server::TlsStream<any_name::Begun>;

fn parse(chain: &[u8], key: &[u8], inside: &[u8]) -> Result<ServerConfig, TlsError> {
    let chain: Vec<_> = CertificateDer::pem_slice_iter(chain).collect::<Result<_, _>>()?;
    server_config(chain, PrivateKeyDer::from_pem_slice(key)?, inside)
}

fn server_config(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    inside: &[u8],
) -> Result<ServerConfig, TlsError> {
    let mut config = ServerConfig::builder_with_provider(any_name::provider())
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![inside.to_vec()];
    Ok(config)
}

/// Whose certificates a client takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trust {
    /// Those that lead to a root which this system trusts.
    System,
    /// Those that lead to one of these roots, PEM.
    Roots(Vec<u8>),
    /// Anybody's: encryption without knowing with whom.
    Anyone,
}

/// How a client speaks TLS. Cheap to clone.
#[derive(Clone)]
pub struct ClientTls(pub(crate) TlsConnector);

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientTls")
    }
}

impl ClientTls {
    /// # Errors
    /// [`TlsError::NoRoots`], or [`TlsError::Pem`] if the roots are not PEM.
    pub fn new(trust: &Trust) -> Result<Self, TlsError> {
        Ok(Self::of(verifying(trust)?.with_no_client_auth()))
    }

    /// A client that shows a certificate, leaf first, whose key this is; both PEM.
    ///
    /// # Errors
    /// As for [`ClientTls::new`], and if certificate and key do not go together.
    pub fn showing(trust: &Trust, chain: &[u8], key: &[u8]) -> Result<Self, TlsError> {
        let chain = CertificateDer::pem_slice_iter(chain).collect::<Result<_, _>>()?;
        let key = PrivateKeyDer::from_pem_slice(key)?;
        Ok(Self::of(
            verifying(trust)?.with_client_auth_cert(chain, key)?,
        ))
    }

    fn of(config: ClientConfig) -> Self {
        Self(TlsConnector::from(Arc::new(config)))
    }

    /// The same, for a client that speaks HTTP/2 and nothing else.
    #[cfg(feature = "http2")]
    pub(crate) fn for_http2(self) -> Self {
        let mut config = ClientConfig::clone(self.0.config());
        config.alpn_protocols = vec![HTTP_2.to_vec()];
        Self::of(config)
    }
}

impl ClientTls {
    /// Speaks TLS with `host`, which may be an address in brackets, over `tcp`.
    pub(crate) async fn connect(&self, host: &str, tcp: TcpStream) -> io::Result<Stream> {
        let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
        let name = ServerName::try_from(bare.unwrap_or(host).to_owned());
        let name = name.map_err(io::Error::other)?;
        let handshake = tokio::time::timeout(HANDSHAKE, self.0.connect(name, tcp));
        Ok(Stream::Tls(Box::new(handshake.await??)))
    }
}

/// What verifies servers as `trust` says.
fn verifying(trust: &Trust) -> Result<ConfigBuilder<ClientConfig, WantsClientCert>, TlsError> {
    let builder =
        ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions()?;
    Ok(match trust {
        Trust::Anyone => builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Unverified(provider()))),
        Trust::Roots(pem) => builder.with_root_certificates(given_roots(pem)?),
        Trust::System => builder.with_root_certificates(system_roots()?),
    })
}

fn given_roots(pem: &[u8]) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_slice_iter(pem) {
        roots.add(root?)?;
    }
    Ok(roots)
}

fn system_roots() -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    let (added, _) =
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    match added {
        0 => Err(TlsError::NoRoots),
        _ => Ok(roots),
    }
}

/// Takes any certificate; still checks that the peer has its key.
#[derive(Debug)]
struct Unverified(Arc<CryptoProvider>);

impl rustls::client::danger::ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, cert, dss, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, cert, dss, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Connects by TCP and, for `https`, speaks TLS over it.
#[derive(Clone, Debug)]
pub(crate) struct Connector {
    tcp: HttpConnector,
    tls: Option<ClientTls>,
}

impl Connector {
    pub(crate) fn new(tcp: HttpConnector, tls: Option<ClientTls>) -> Self {
        Self { tcp, tls }
    }
}

impl Service<Uri> for Connector {
    type Response = TokioIo<Stream>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.tcp.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let tls = self
            .tls
            .clone()
            .filter(|_| uri.scheme_str() == Some("https"));
        let host = uri.host().unwrap_or_default().to_owned();
        let connecting = self.tcp.call(uri);
        Box::pin(async move {
            let tcp = connecting.await?.into_inner();
            let stream = match tls {
                None => Stream::Plain(tcp),
                Some(tls) => tls.connect(&host, tcp).await?,
            };
            Ok(TokioIo::new(stream))
        })
    }
}

/// A connection of either kind.
#[derive(Debug)]
pub(crate) enum Stream {
    Plain(TcpStream),
    Tls(Box<client::TlsStream<TcpStream>>),
}

impl Connection for Stream {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_read(cx, buf),
            Self::Tls(s) => Pin::new(s).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_write(cx, buf),
            Self::Tls(s) => Pin::new(s).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_write_vectored(cx, bufs),
            Self::Tls(s) => Pin::new(s).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(s) => s.is_write_vectored(),
            Self::Tls(s) => s.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_flush(cx),
            Self::Tls(s) => Pin::new(s).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(s) => Pin::new(s).poll_shutdown(cx),
            Self::Tls(s) => Pin::new(s).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Client, ServeConfig, collect, serve};
    use http::{Request, Response};
    use http_body_util::Full;
    use hyper::body::{Bytes, Incoming};
    use hyper::service::service_fn;
    use std::convert::Infallible;
    use tokio::net::TcpListener;
    use tokio_util::sync::CancellationToken;

    /// A certificate and its key.
    fn pair() -> (String, String) {
        let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
        (made.cert.pem(), made.signing_key.serialize_pem())
    }

    /// A client that trusts `root` and has no connection yet.
    async fn get(uri: &str, root: &str) -> Option<Bytes> {
        let tls = ClientTls::new(&Trust::Roots(root.as_bytes().to_vec())).unwrap();
        let client = Client::with_tls(&crate::ClientConfig::default(), tls);
        let request = Request::get(uri).body(Full::<Bytes>::default()).unwrap();
        let response = client.send(request).await.ok()?;
        collect(response.into_body(), 10).await.ok()
    }

    #[tokio::test]
    async fn a_certificate_can_be_replaced_while_it_is_shown() {
        let (old, new) = (pair(), pair());
        let identity = Identity::from_pem(old.0.as_bytes(), old.1.as_bytes()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let uri = format!("https://{}/", listener.local_addr().unwrap());
        let config = ServeConfig {
            tls: Some(identity.clone()),
            ..ServeConfig::default()
        };
        let service = service_fn(async |_: Request<Incoming>| {
            Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(b"hello"))))
        });
        tokio::spawn(serve(listener, service, config, CancellationToken::new()));
        assert_eq!(get(&uri, &old.0).await.unwrap(), "hello");
        assert!(get(&uri, &new.0).await.is_none());
        assert!(identity.replace_pem(b"nonsense", b"").is_err());
        assert!(
            identity
                .replace_pem(new.0.as_bytes(), old.1.as_bytes())
                .is_err()
        );
        assert_eq!(get(&uri, &old.0).await.unwrap(), "hello");
        identity
            .replace_pem(new.0.as_bytes(), new.1.as_bytes())
            .unwrap();
        assert_eq!(get(&uri, &new.0).await.unwrap(), "hello");
        assert!(get(&uri, &old.0).await.is_none());
    }
}
