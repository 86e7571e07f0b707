//! The addresses that the operator connects to on behalf of a tenant: names are resolved once, and the connection goes to the address
//! that was checked, so that a second answer of the name server (DNS rebinding) has no effect.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::net::{TcpStream, lookup_host};
use tokio::time::sleep;

use super::network::{Network, embedded_ipv4};

/// The delay before the next address of a host is tried while the previous one has not answered: the recommendation of RFC 8305, section 5.
const CONNECTION_ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// Maximum number of addresses of a host that are tried. A name server that a tenant controls may return hundreds.
const MAX_ADDRESSES: usize = 16;

/// Metadata services of cloud providers outside the link-local network: AWS and Google over IPv6, Alibaba, Oracle, and Azure's host agent.
const METADATA_SERVICES: [IpAddr; 5] = [
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V6(Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
];

/// Why an address is refused.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Forbidden {
    /// The machine itself.
    #[error("a loopback address")]
    Loopback,
    /// No address; Linux connects to the machine itself.
    #[error("an unspecified address")]
    Unspecified,
    /// The link of the node, where cloud providers serve metadata and credentials.
    #[error("a link-local address")]
    LinkLocal,
    /// A group of machines.
    #[error("a multicast or broadcast address")]
    Multicast,
    /// A metadata service of a cloud provider.
    #[error("an address of a cloud provider's metadata service")]
    Metadata,
    /// The Kubernetes API server.
    #[error("an address of the Kubernetes API server")]
    ApiServer,
}

/// Why no address of a host is used.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    /// A name that resolves to no address.
    #[error("failed to resolve {host}")]
    Resolve {
        /// The host.
        host: String,
        /// The answer of the resolver.
        #[source]
        source: io::Error,
    },

    /// A name without addresses.
    #[error("failed to resolve {host}: it has no address")]
    FindAddress {
        /// The host.
        host: String,
    },

    /// An address that the policy refuses.
    #[error(
        "failed to connect to {host}: {address} is {forbidden}, to which the operator does not connect for a Gateway or a Pipeline; use another \
         address, or let an administrator add {address} to `allowedAddresses` of the chart fleetwright (--allow-addresses)"
    )]
    Forbid {
        /// The host.
        host: String,
        /// The refused address.
        address: IpAddr,
        /// Why.
        forbidden: Forbidden,
    },
}

/// Which addresses the operator connects to.
#[derive(Clone, Debug, Default)]
pub struct AddressPolicy {
    allowed: Arc<[Network]>,
    api_server: Arc<[IpAddr]>,
}

impl AddressPolicy {
    /// Refuses the addresses of the API server and the special addresses of [`Forbidden`], except for the `allowed` ones.
    #[must_use]
    pub fn new(allowed: &[Network], api_server: &[IpAddr]) -> Self {
        Self { allowed: allowed.into(), api_server: api_server.iter().map(IpAddr::to_canonical).collect() }
    }

    /// Why the address is refused, if it is.
    ///
    /// # Errors
    /// The kind of the address.
    pub fn check(&self, address: IpAddr) -> Result<(), Forbidden> {
        let address = address.to_canonical();
        if self.allowed.iter().any(|network| network.contains(address)) {
            return Ok(());
        }
        if self.api_server.contains(&address) {
            return Err(Forbidden::ApiServer);
        }
        if METADATA_SERVICES.contains(&address) {
            return Err(Forbidden::Metadata);
        }
        match address {
            IpAddr::V4(address) => check_ipv4(address),
            IpAddr::V6(address) => {
                check_ipv6(address)?;
                embedded_ipv4(address).map_or(Ok(()), |embedded| self.check(embedded.into()))
            }
        }
    }

    /// The addresses of a host, all of which are allowed.
    ///
    /// # Errors
    /// If the name has no address, or the policy refuses one of them.
    pub async fn resolve(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>, AddressError> {
        let found = lookup_host((host, port)).await.map_err(|source| AddressError::Resolve { host: host.to_owned(), source })?;
        let mut addresses: Vec<SocketAddr> = found.collect();
        for address in &addresses {
            let address = address.ip();
            self.check(address).map_err(|forbidden| AddressError::Forbid { host: host.to_owned(), address, forbidden })?;
        }
        addresses.truncate(MAX_ADDRESSES);
        if addresses.is_empty() { Err(AddressError::FindAddress { host: host.to_owned() }) } else { Ok(addresses) }
    }
}

fn check_ipv4(address: Ipv4Addr) -> Result<(), Forbidden> {
    match address {
        // 0.0.0.0/8 is "this network" (RFC 6890).
        _ if address.octets()[0] == 0 => Err(Forbidden::Unspecified),
        _ if address.is_loopback() => Err(Forbidden::Loopback),
        _ if address.is_link_local() => Err(Forbidden::LinkLocal),
        _ if address.is_multicast() || address.is_broadcast() => Err(Forbidden::Multicast),
        _ => Ok(()),
    }
}

fn check_ipv6(address: Ipv6Addr) -> Result<(), Forbidden> {
    match address {
        _ if address.is_unspecified() => Err(Forbidden::Unspecified),
        _ if address.is_loopback() => Err(Forbidden::Loopback),
        _ if address.is_unicast_link_local() => Err(Forbidden::LinkLocal),
        _ if address.is_multicast() => Err(Forbidden::Multicast),
        _ => Ok(()),
    }
}

/// Connects to the first of these addresses that answers. Each attempt starts a moment after the one before, so that an address without an
/// answer costs little (RFC 8305).
///
/// # Errors
/// The failure of the last attempt.
pub async fn connect(addresses: &[SocketAddr]) -> io::Result<TcpStream> {
    let delays = (0_u32..).map(|number| CONNECTION_ATTEMPT_DELAY * number);
    let mut attempts: FuturesUnordered<_> = addresses
        .iter()
        .zip(delays)
        .map(|(address, delay)| async move {
            sleep(delay).await;
            TcpStream::connect(address).await
        })
        .collect();
    let mut failure = io::Error::from(io::ErrorKind::AddrNotAvailable);
    while let Some(attempt) = attempts.next().await {
        match attempt {
            Ok(stream) => return Ok(stream),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    fn policy(allowed: &[&str]) -> AddressPolicy {
        let allowed: Vec<Network> = allowed.iter().map(|network| network.parse().unwrap()).collect();
        AddressPolicy::new(&allowed, &["10.96.0.1".parse().unwrap(), "fd00:96::1".parse().unwrap()])
    }

    #[test]
    fn special_addresses_are_refused_unless_allowed() {
        use Forbidden::*;
        for (address, expected) in [
            ("127.0.0.1", Some(Loopback)),
            ("127.255.255.254", Some(Loopback)),
            ("::1", Some(Loopback)),
            ("::ffff:127.0.0.1", Some(Loopback)),
            ("64:ff9b::7f00:1", Some(Loopback)),
            ("0.0.0.0", Some(Unspecified)),
            ("0.1.2.3", Some(Unspecified)),
            ("::", Some(Unspecified)),
            ("169.254.169.254", Some(LinkLocal)),
            ("2002:a9fe:a9fe::1", Some(LinkLocal)),
            ("fe80::1", Some(LinkLocal)),
            ("febf::1", Some(LinkLocal)),
            ("224.0.0.1", Some(Multicast)),
            ("255.255.255.255", Some(Multicast)),
            ("ff02::1", Some(Multicast)),
            ("fd00:ec2::254", Some(Metadata)),
            ("100.100.100.200", Some(Metadata)),
            ("10.96.0.1", Some(ApiServer)),
            ("::ffff:10.96.0.1", Some(ApiServer)),
            ("64:ff9b::10.96.0.1", Some(ApiServer)),
            ("fd00:96::1", Some(ApiServer)),
            ("10.96.0.2", None),
            ("192.168.1.1", None),
            ("203.0.113.7", None),
            ("2001:db8::1", None),
            ("fd00::1", None),
        ] {
            let address: IpAddr = address.parse().unwrap();
            assert_eq!(policy(&[]).check(address).err(), expected, "{address}");
            assert_eq!(policy(&["0.0.0.0/0", "::/0"]).check(address), Ok(()), "{address}");
        }
        let loopback = policy(&["127.0.0.0/8"]);
        assert_eq!(loopback.check("127.0.0.1".parse().unwrap()), Ok(()));
        assert_eq!(loopback.check("::1".parse().unwrap()), Err(Loopback));
    }

    #[tokio::test]
    async fn the_resolved_address_is_checked() {
        for host in ["localhost", "127.0.0.1", "::1"] {
            let error = policy(&[]).resolve(host, 5432).await.unwrap_err();
            assert!(matches!(error, AddressError::Forbid { forbidden: Forbidden::Loopback, .. }), "{error}");
        }
        let allowed = policy(&["127.0.0.0/8", "::1"]).resolve("localhost", 5432).await.unwrap();
        assert!(!allowed.is_empty() && allowed.iter().all(|address| address.ip().is_loopback() && address.port() == 5432));
        assert!(matches!(policy(&[]).resolve("nowhere.invalid", 1).await, Err(AddressError::Resolve { .. })));
    }

    #[tokio::test]
    async fn a_later_address_is_used_if_the_first_refuses() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let open = listener.local_addr().unwrap();
        assert_eq!(connect(&[closed, open]).await.unwrap().peer_addr().unwrap(), open);
        assert!(connect(&[closed]).await.is_err());
        assert!(connect(&[]).await.is_err());
    }
}
