//! How a function speaks with the IOMMU in front of it beyond plain memory requests: translations it asks for,
//! requests with a process address space or with addresses that it translated itself, page requests.
//!
//! PCI Express calls the other side the translation agent (Base Specification 10.1.1). Answers come by
//! [`super::amd::processor::Follower`]: invalidations of what the function keeps, responses to page requests.

use super::amd::ppr::{Answer, PageRequest};
use super::amd::request::{AtsCompletion, Request};

/// The agent refused: an unsupported request, or a completion without data. It has told the guest, as far as the
/// guest wants to know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Refused;

/// What the address of a request is (Address Type; PCI Express Base Specification 10.2.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AddressType {
    /// The agent translates it.
    Untranslated,
    /// The function translated it.
    Translated,
}

/// The IOMMU as one function sees it. Each call is one piece of work: when it returns, nothing of it is in
/// flight.
pub trait TranslationAgent: Send + Sync {
    /// A translation request.
    fn translate(&self, request: &Request) -> Result<AtsCompletion, Refused>;

    /// Read `data.len()` bytes from where `request` says.
    fn read(&self, request: &Request, address: AddressType, data: &mut [u8]) -> Result<(), Refused>;

    /// Write `data` to where `request` says, all or nothing.
    fn write(&self, request: &Request, address: AddressType, data: &[u8]) -> Result<(), Refused>;

    /// A page request.
    fn page_request(&self, request: &PageRequest) -> Answer;
}
