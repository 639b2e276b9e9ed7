//! ZeroMQ's message transport protocol, version 3.x, as far as events need it: TCP, no authentication, and the sockets
//! PUB, SUB, ROUTER and DEALER.
//!
//! `frame` is the protocol as bytes, `connection` the sockets. Why our own: it is small, its peers are named by the
//! configuration, and the queues of a library are not bounded by bytes.

pub(crate) mod connection;
pub(crate) mod frame;
