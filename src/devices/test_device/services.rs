//! Translation services: what the device asks of the IOMMU in front of it, what it keeps of the answers, and what
//! it is told to forget.
//!
//! Lock order: kept translations, then the endpoint's registers. Whoever uses a kept translation holds the lock
//! until the access is over, so that an invalidation that was obeyed is obeyed for every access. An invalidation
//! takes nothing of the device's but these two.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::registers::{Answered, Route};
use super::spec::{Rights, TranslationInfo};
use crate::iommu::agent::{AddressType, Refused, TranslationAgent};
use crate::iommu::amd::commands::Command;
use crate::iommu::amd::pages::PageRange;
use crate::iommu::amd::ppr::{Answer, PageRequest};
use crate::iommu::amd::processor::{Follower, NoAnswer};
use crate::iommu::amd::request::{Access, AtsCompletion, Pasid, Request};
use crate::pci::capability::{PageRequests, ProcessAddressSpace, TranslationServices};
use crate::pci::endpoint::Endpoint;
use crate::platform::addr::Iova;

/// Page requests that may be outstanding.
pub(super) const PAGE_REQUESTS: u32 = 32;
/// Bits of a process address space ID.
pub(super) const PASID_WIDTH: u8 = 20;
/// Translations kept at most; the oldest goes.
const MOST_KEPT: usize = 64;
/// Response Code: the function shall not ask again (PCI Express Base Specification 10.4.2.1).
const RESPONSE_FAILURE: u8 = 15;

/// What the device has to do with translations.
pub(super) struct Services {
    endpoint: Arc<Endpoint>,
    agent: Option<Arc<dyn TranslationAgent>>,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    translations: Vec<Translation>,
    invalidations: u32,
    /// The last response to a page request.
    response: Option<(u16, u8)>,
}

/// A translation that the device asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Translation {
    pasid: Option<Pasid>,
    /// First byte of the page.
    first: u64,
    /// Last byte of the page.
    last: u64,
    completion: AtsCompletion,
}

impl Translation {
    fn overlaps(&self, pages: PageRange) -> bool {
        match pages {
            PageRange::Everything => true,
            PageRange::Span { first, last } => self.first <= last && first <= self.last,
        }
    }

    /// Where `at` lies.
    fn target(&self, at: u64) -> Option<u64> {
        let offset = at.checked_sub(self.first).filter(|_| at <= self.last)?;
        self.completion.target.0.checked_add(offset)
    }
}

impl Services {
    /// The device of `endpoint` speaks with `agent`, if there is one.
    pub(super) fn new(endpoint: Arc<Endpoint>, agent: Option<Arc<dyn TranslationAgent>>) -> Self {
        Self {
            endpoint,
            agent,
            kept: Mutex::default(),
        }
    }

    /// How many translations are kept.
    pub(super) fn kept(&self) -> u32 {
        u32::try_from(self.lock().translations.len()).expect("at most MOST_KEPT")
    }

    /// How many invalidations came since the reset.
    pub(super) fn invalidations(&self) -> u32 {
        self.lock().invalidations
    }

    /// The last response to a page request: group, response code, and the top bit; 0 when there was none.
    pub(super) fn response(&self) -> u32 {
        let response = self.lock().response;
        response.map_or(0, |(group, code)| {
            1 << 31 | u32::from(code) << 12 | u32::from(group)
        })
    }

    /// As after power-on.
    pub(super) fn reset(&self) {
        *self.lock() = Kept::default();
    }

    /// Ask where `at` lies, keep the answer, and say it.
    pub(super) fn translate(&self, route: Route, at: u64, rights: Rights) -> Result<Answered, Refused> {
        let (agent, request) = self.request(route, at, access(rights))?;
        let mut kept = self.lock();
        let completion = self.ask(&mut kept, agent, &request)?;
        Ok(Answered {
            target: completion.target.0,
            info: TranslationInfo::new()
                .with_shift(u8::try_from(completion.shift).unwrap_or(u8::MAX))
                .with_read(completion.allowed.read)
                .with_write(completion.allowed.write)
                .with_untranslated_only(completion.untranslated_only),
        })
    }

    /// Ask for the page at `at` to be brought in.
    pub(super) fn request_page(&self, route: Route, at: u64, rights: Rights) -> Result<(), Refused> {
        let (agent, request) = self.request(route, at, access(rights))?;
        let execute = rights.execute() && self.with::<ProcessAddressSpace>(ProcessAddressSpace::may_execute);
        let group = rights.group();
        self.lock().response = None;
        let issued = {
            let mut config = self.endpoint.config();
            let requests = config.capabilities_mut().get_mut::<PageRequests>();
            requests.is_some_and(|requests| requests.issue(group))
        };
        if !issued {
            return Err(Refused);
        }
        let answer = agent.page_request(&PageRequest {
            device: request.requester,
            pasid: request.pasid,
            at: request.at,
            access: request.access,
            execute,
            privileged: request.privileged,
            group,
            last: rights.last(),
        });
        let code = match answer {
            Answer::Later => return Ok(()),
            Answer::Failure => RESPONSE_FAILURE,
            Answer::Invalid => 1,
        };
        self.answered(group, code);
        Err(Refused)
    }

    /// Read as `route` says; at most a page.
    pub(super) fn read(&self, route: Route, at: u64, data: &mut [u8]) -> Result<(), Refused> {
        let (agent, request) = self.request(route, at, Access::READ)?;
        self.reach(route, agent, request, |agent, request, address| {
            agent.read(request, address, data)
        })
    }

    /// Write as `route` says; at most a page.
    pub(super) fn write(&self, route: Route, at: u64, data: &[u8]) -> Result<(), Refused> {
        let (agent, request) = self.request(route, at, Access::WRITE)?;
        self.reach(route, agent, request, |agent, request, address| {
            agent.write(request, address, data)
        })
    }

    /// Do `access` with `request`, or with what the device translated it to.
    fn reach(
        &self,
        route: Route,
        agent: &dyn TranslationAgent,
        request: Request,
        access: impl FnOnce(&dyn TranslationAgent, &Request, AddressType) -> Result<(), Refused>,
    ) -> Result<(), Refused> {
        if !route.translated {
            return access(agent, &request, AddressType::Untranslated);
        }
        // Held until the access is over.
        let mut kept = self.lock();
        let found = kept.find(&request);
        let found = match found {
            Some(found) if found.completion.allowed.allows(request.access) => found,
            _ => {
                self.ask(&mut kept, agent, &request)?;
                kept.find(&request).ok_or(Refused)?
            }
        };
        let AtsCompletion {
            allowed,
            untranslated_only,
            ..
        } = found.completion;
        if !allowed.allows(request.access) {
            return Err(Refused);
        }
        if untranslated_only {
            return access(agent, &request, AddressType::Untranslated);
        }
        let target = found.target(request.at.0).ok_or(Refused)?;
        access(agent, &request.moved_to(Iova(target)), AddressType::Translated)
    }

    /// Ask for a translation, and keep it.
    fn ask(
        &self,
        kept: &mut Kept,
        agent: &dyn TranslationAgent,
        request: &Request,
    ) -> Result<AtsCompletion, Refused> {
        if !self.with::<TranslationServices>(TranslationServices::enabled) {
            return Err(Refused);
        }
        let completion = agent.translate(request)?;
        if completion.allowed != Access::NONE {
            kept.keep(request, completion);
        }
        Ok(completion)
    }

    /// A request to `at` as `route` says, as far as the guest allows that.
    fn request(
        &self,
        route: Route,
        at: u64,
        access: Access,
    ) -> Result<(&dyn TranslationAgent, Request), Refused> {
        let agent = self.agent.as_deref().ok_or(Refused)?;
        let requester = self.endpoint.requester();
        if !requester.bus_master() {
            return Err(Refused);
        }
        let mut request = Request::plain(requester.sbdf().bdf, Iova(at), access);
        if let Some(pasid) = route.pasid {
            // A write that a switch stops is lost without an answer; to the device it counts as refused as well.
            if !self.with::<ProcessAddressSpace>(ProcessAddressSpace::enabled) || requester.prefixes_blocked()
            {
                return Err(Refused);
            }
            request = request.in_space(Pasid::new(pasid).ok_or(Refused)?);
            request.privileged =
                route.privileged && self.with::<ProcessAddressSpace>(ProcessAddressSpace::may_be_privileged);
        }
        Ok((agent, request))
    }

    /// What a capability says; `false` where there is none.
    fn with<C: crate::pci::capability::Capability>(&self, asked: fn(&C) -> bool) -> bool {
        self.endpoint
            .config()
            .capabilities()
            .get::<C>()
            .is_some_and(asked)
    }

    /// A response to a page request came.
    fn answered(&self, group: u16, code: u8) {
        self.lock().response = Some((group, code));
        let mut config = self.endpoint.config();
        if let Some(requests) = config.capabilities_mut().get_mut::<PageRequests>() {
            requests.answered(group, code == RESPONSE_FAILURE);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn find(&self, request: &Request) -> Option<Translation> {
        let mut translations = self.translations.iter().rev();
        translations
            .find(|kept| kept.pasid == request.pasid && kept.target(request.at.0).is_some())
            .copied()
    }

    fn keep(&mut self, request: &Request, completion: AtsCompletion) {
        let within = 1_u64
            .checked_shl(completion.shift)
            .map_or(u64::MAX, |size| size - 1);
        let first = request.at.0 & !within;
        let new = Translation {
            pasid: request.pasid,
            first,
            last: first | within,
            completion,
        };
        // A new answer replaces the old one.
        self.translations
            .retain(|kept| kept.pasid != new.pasid || kept.last < new.first || new.last < kept.first);
        if self.translations.len() >= MOST_KEPT {
            self.translations.remove(0);
        }
        self.translations.push(new);
    }
}

fn access(rights: Rights) -> Access {
    Access::new(rights.read(), rights.write())
}

impl Follower for Services {
    fn follow(&self, batch: &[Command]) -> Result<(), NoAnswer> {
        let own = self.endpoint.requester().sbdf().bdf;
        for command in batch {
            match *command {
                Command::InvalidateIotlb { device, space, pages } if device == own => {
                    let mut kept = self.lock();
                    kept.translations
                        .retain(|translation| translation.pasid != space || !translation.overlaps(pages));
                    kept.invalidations = kept.invalidations.wrapping_add(1);
                }
                Command::CompletePageRequest {
                    device,
                    group,
                    response,
                    ..
                } if device == own => self.answered(group, response),
                _ => {}
            }
        }
        Ok(())
    }
}
