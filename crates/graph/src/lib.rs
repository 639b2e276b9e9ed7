//! baton-graph
