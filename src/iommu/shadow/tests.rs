//! Tests of the shadow.
