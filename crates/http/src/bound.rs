//! Connections over TLS without certificates that mean anything: whoever is at both ends can tell, by a proof over what
//! only the two ends of one connection see, that nobody is between them.

use crate::tls::{ClientTls, HANDSHAKE, Identity};
use rustls::pki_types::ServerName;
use rustls::{ConnectionCommon, ProtocolVersion, SideData};
use std::io;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

/// What tells a connection from every other: the exporter value of RFC 9266.
pub type Binding = [u8; 32];

const LABEL: &[u8] = b"EXPORTER-Channel-Binding";

impl Identity {
    /// The server's end of a connection.
    ///
    /// # Errors
    /// What the system or TLS says; the other end must speak TLS 1.3, and soon.
    pub async fn accept_bound(
        &self,
        stream: TcpStream,
    ) -> io::Result<(
        impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        Binding,
    )> {
        let stream = self.accept(stream).await?;
        let binding = binding(stream.get_ref().1)?;
        Ok((stream, binding))
    }
}

impl ClientTls {
    /// The client's end of a connection.
    ///
    /// # Errors
    /// As for [`Identity::accept_bound`].
    pub async fn connect_bound(
        &self,
        stream: TcpStream,
    ) -> io::Result<(
        impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        Binding,
    )> {
        let name = ServerName::from(stream.peer_addr()?.ip());
        let handshake = self.0.connect(name, stream);
        let stream = tokio::time::timeout(HANDSHAKE, handshake).await??;
        let binding = binding(stream.get_ref().1)?;
        Ok((stream, binding))
    }
}

fn binding<Side: SideData>(connection: &ConnectionCommon<Side>) -> io::Result<Binding> {
    // Before 1.3 two connections may be made to have one value.
    if connection.protocol_version() != Some(ProtocolVersion::TLSv1_3) {
        return Err(io::Error::other("the other end speaks no TLS 1.3"));
    }
    connection
        .export_keying_material([0; 32], LABEL, None)
        .map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Trust;
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn both_ends_of_a_connection_and_nobody_else_see_one_value() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let identity = Identity::self_signed().unwrap();
        let tls = ClientTls::new(&Trust::Anyone).unwrap();
        let mut seen = Vec::new();
        for _ in 0..2 {
            let client = TcpStream::connect(at).await.unwrap();
            let (server, _) = listener.accept().await.unwrap();
            let (client, server) =
                tokio::join!(tls.connect_bound(client), identity.accept_bound(server));
            let (client, server) = (client.unwrap().1, server.unwrap().1);
            assert_eq!(client, server);
            seen.push(client);
        }
        assert_ne!(seen[0], seen[1]);
    }
}
