//! Who may read `/metrics` where Kubernetes knows: a bearer token is asked for, and its owner's rights.

use baton_k8s::Access;
use http::header::AUTHORIZATION;
use http::{Request, StatusCode};

/// The status by which a request is refused; nothing if its sender may read the path that is asked for.
pub(crate) async fn refused<B>(access: &Access, request: &Request<B>) -> Option<StatusCode> {
    let Some(token) = token(request) else {
        return Some(StatusCode::UNAUTHORIZED);
    };
    match access.may_get(token, request.uri().path()).await {
        Ok(true) => None,
        Ok(false) => Some(StatusCode::FORBIDDEN),
        Err(error) => {
            let source = std::error::Error::source(&error).map(ToString::to_string);
            tracing::warn!(%error, source, "who may read the metrics is not known");
            Some(StatusCode::INTERNAL_SERVER_ERROR)
        }
    }
}

/// The word after `Bearer`, which is written in any case.
fn token<B>(request: &Request<B>) -> Option<&str> {
    let value = request.headers().get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_a_bearers() {
        let read = |value: &str| {
            let request = Request::get("/metrics").header(AUTHORIZATION, value);
            token(&request.body(()).unwrap()).map(str::to_owned)
        };
        assert_eq!(read("Bearer abc").as_deref(), Some("abc"));
        assert_eq!(read("bearer  abc ").as_deref(), Some("abc"));
        for other in ["Bearer", "Bearer ", "Basic abc", "abc"] {
            assert_eq!(read(other), None, "{other}");
        }
        assert_eq!(token(&Request::get("/metrics").body(()).unwrap()), None);
    }
}
