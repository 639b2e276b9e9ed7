//! Which path leads where, and what stands before all of them: authentication and request ids.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use baton_kv::LeaseToken;
use baton_kv_transfer::RejectCode;
use baton_openai::{Model, ModelList};
use http::{HeaderMap, HeaderValue, StatusCode, header};

use crate::app::App;
use crate::metrics::events;
use crate::rejection::{Rejection, json};
use crate::{auth, generate, id, tokens};

/// The router of a server.
pub(crate) fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/health", get(health))
        .route("/ping", get(health).post(health))
        .route("/version", get(version))
        .route("/load", get(load))
        .route("/metrics", get(metrics))
        .route("/v1/models", get(models))
        .route("/v1/completions", post(generate::completions))
        .route("/v1/chat/completions", post(generate::chat))
        .route("/kv/v1/leases/{uuid}", delete(release))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .fallback(async || Rejection::NOT_FOUND)
        .method_not_allowed_fallback(async || Rejection::METHOD)
        .layer(middleware::from_fn_with_state(Arc::clone(&app), before_all))
        .with_state(app)
}

async fn before_all(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let given = request.headers().get("x-request-id").cloned();
    let (method, path) = (request.method(), request.uri().path());
    let mut response = if auth::allows(&app.config.api_keys, method, path, request.headers()) {
        next.run(request).await
    } else {
        Rejection::Unauthorized.into_response()
    };
    if app.config.request_id_headers {
        let id = given.or_else(|| HeaderValue::try_from(fresh_request_id()).ok());
        id.map(|id| response.headers_mut().insert("x-request-id", id));
    }
    response
}

fn fresh_request_id() -> String {
    format!("{:016x}{:016x}", id::random(), id::random())
}

async fn health(State(app): State<Arc<App>>) -> StatusCode {
    if app.life.is_ready() {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    }
}

async fn version() -> Response {
    json(
        StatusCode::OK,
        concat!(r#"{"version":""#, env!("CARGO_PKG_VERSION"), r#""}"#).into(),
    )
}

async fn load(State(app): State<Arc<App>>) -> Response {
    json(
        StatusCode::OK,
        format!(r#"{{"server_load":{}}}"#, app.load.load(Ordering::Relaxed)).into(),
    )
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    let server = app.kv_server.as_ref().map(|server| server.stats());
    let client = app.kv_client.as_ref().map(|client| client.stats());
    let mut text = app.metrics.text(server.as_ref(), client.as_ref());
    if let Some(publisher) = &app.publisher {
        events::write(&mut text, &publisher.stats());
    }
    (
        [(
            header::CONTENT_TYPE,
            "text/plain; version=0.0.4; charset=utf-8",
        )],
        Body::from(text),
    )
        .into_response()
}

/// `DELETE /kv/v1/leases/{uuid}`: a router whose request ended gives back the KV that was kept for it. The lease's token is
/// the right to do so.
async fn release(
    State(app): State<Arc<App>>,
    Path(uuid): Path<u64>,
    headers: HeaderMap,
) -> StatusCode {
    let token = headers.get("x-kvx-token").and_then(|t| t.to_str().ok());
    let token = token.and_then(LeaseToken::from_text);
    let (Some(server), Some(token)) = (&app.kv_server, token) else {
        return StatusCode::FORBIDDEN;
    };
    match server.revoke(uuid, &token) {
        Ok(()) => StatusCode::NO_CONTENT,
        Err(RejectCode::BadToken) => StatusCode::FORBIDDEN,
        Err(_) => StatusCode::NOT_FOUND,
    }
}

async fn models(State(app): State<Arc<App>>) -> Response {
    let card = &app.card;
    let model = |name: &String| {
        let permission = format!("{:016x}", id::random());
        Model::new(
            name,
            &card.root,
            card.max_model_len,
            app.created,
            &permission,
        )
    };
    let list = ModelList::new(card.served_names.iter().map(model).collect());
    json(
        StatusCode::OK,
        serde_json::to_vec(&list).unwrap_or_default(),
    )
}
