//! A TCP proxy that simulates network faults: cuts, half-closes, stalls, delays, refused connections.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use super::free_port;

/// A fault in one direction of every open connection.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// Passes this number of further bytes, then closes the whole connection, mostly within a packet.
    CutAfter(usize),
    /// Passes nothing more and sends FIN. The other direction continues.
    HalfClose,
    /// Delays the next data and everything behind it by this time.
    Delay(Duration),
}

/// Direction of the data.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Way {
    /// From client to server.
    Up,
    /// From server to client.
    Down,
}

/// State of the proxy.
const PASSES: u8 = 0;
const STALLS: u8 = 1;
const REFUSES: u8 = 2;
const ENDED: u8 = 3;

/// A proxy in front of servers of this machine; it ends on drop.
pub struct Proxy {
    /// Port of the proxy.
    pub port: u16,
    shared: Arc<Shared>,
}

struct Shared {
    /// Ports of the servers, which are used in turn.
    servers: Vec<u16>,
    turn: AtomicUsize,
    /// Whether the server may send until it closes the connection after the client has gone.
    drains: bool,
    mode: AtomicU8,
    links: Mutex<Vec<Arc<Link>>>,
    /// Signals changes of `mode` and ends of connections.
    changed: (Mutex<()>, Condvar),
}

/// A connection through the proxy.
struct Link {
    sides: [TcpStream; 2],
    faults: [Mutex<Option<Fault>>; 2],
    ended: AtomicBool,
}

impl Link {
    fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        for side in &self.sides {
            let _ = side.shutdown(Shutdown::Both);
        }
    }
}

impl Proxy {
    /// Starts a proxy in front of this port.
    pub fn start(server: u16) -> Self {
        Self::start_with(vec![server], false)
    }

    /// Starts a proxy that connects to these ports in turn, as a load balancer does. A server receives the end of a client in order:
    /// its data is accepted until it has closed too.
    pub fn balance(servers: Vec<u16>) -> Self {
        Self::start_with(servers, true)
    }

    fn start_with(servers: Vec<u16>, drains: bool) -> Self {
        let port = free_port();
        let (turn, mode) = (AtomicUsize::new(0), AtomicU8::new(PASSES));
        let shared = Arc::new(Shared { servers, turn, drains, mode, links: Mutex::default(), changed: Default::default() });
        let accepting = shared.clone();
        std::thread::spawn(move || accepting.accept(port));
        let proxy = Self { port, shared };
        super::mosquitto::wait_until("the proxy", || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok());
        proxy
    }

    /// Applies a fault to one direction of all open connections.
    pub fn harm(&self, way: Way, fault: Fault) {
        for link in self.shared.links.lock().unwrap().iter() {
            *link.faults[way as usize].lock().unwrap() = Some(fault);
        }
    }

    /// Closes all connections.
    pub fn cut(&self) {
        for link in self.shared.links.lock().unwrap().iter() {
            link.end();
        }
        self.shared.tell();
    }

    /// Closes the oldest connection of a client.
    pub fn cut_oldest(&self) {
        if let Some(link) = self.shared.links.lock().unwrap().first() {
            let _ = link.sides[0].shutdown(Shutdown::Both);
        }
    }

    /// From now on no data passes. Connections stay open and new ones are accepted.
    pub fn stall(&self) {
        self.shared.set(STALLS);
    }

    /// From now on connections are refused. All open connections are closed.
    pub fn refuse(&self) {
        self.shared.set(REFUSES);
        self.cut();
    }

    /// Restores normal operation.
    pub fn pass(&self) {
        self.shared.set(PASSES);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.set(ENDED);
        self.cut();
    }
}

impl Shared {
    fn set(&self, mode: u8) {
        self.mode.store(mode, Ordering::SeqCst);
        self.tell();
    }

    fn tell(&self) {
        let _held = self.changed.0.lock().unwrap();
        self.changed.1.notify_all();
    }

    fn mode(&self) -> u8 {
        self.mode.load(Ordering::SeqCst)
    }

    fn accept(self: Arc<Self>, port: u16) {
        let mut listener = None;
        while self.mode() != ENDED {
            if self.mode() == REFUSES {
                listener = None;
            } else if listener.is_none() {
                listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).ok().filter(|listener| listener.set_nonblocking(true).is_ok());
            }
            match listener.as_ref().map(TcpListener::accept) {
                Some(Ok((client, _))) => self.clone().link(client),
                _ => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    fn link(self: Arc<Self>, client: TcpStream) {
        let server = self.servers[self.turn.fetch_add(1, Ordering::SeqCst) % self.servers.len()];
        let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, server)) else { return };
        for side in [&client, &server] {
            side.set_nonblocking(false).unwrap();
            side.set_nodelay(true).unwrap();
        }
        let link = Arc::new(Link { sides: [client, server], faults: Default::default(), ended: AtomicBool::new(false) });
        self.links.lock().unwrap().push(link.clone());
        if self.mode() == REFUSES {
            link.end();
        }
        let halves = [Way::Up, Way::Down].map(|way| {
            let (shared, link) = (self.clone(), link.clone());
            std::thread::spawn(move || shared.pump(&link, way))
        });
        std::thread::spawn(move || {
            for half in halves {
                half.join().unwrap();
            }
            link.end();
            self.links.lock().unwrap().retain(|other| !Arc::ptr_eq(other, &link));
        });
    }

    /// Forwards the data of one direction until its end or a fault.
    fn pump(&self, link: &Link, way: Way) {
        let (mut from, mut to) = if way == Way::Up { (&link.sides[0], &link.sides[1]) } else { (&link.sides[1], &link.sides[0]) };
        let mut buffer = [0; 16 * 1024];
        loop {
            let read = match from.read(&mut buffer) {
                // Forwards the end of one direction.
                Ok(0) => return drop(to.shutdown(Shutdown::Write)),
                Ok(read) => read,
                Err(_) if self.drains && way == Way::Up => return drop(to.shutdown(Shutdown::Write)),
                Err(_) => return link.end(),
            };
            self.wait_while_stalled(link);
            let fault = link.faults[way as usize].lock().unwrap().take();
            let passes = match fault {
                Some(Fault::CutAfter(left)) if left < read => left,
                Some(Fault::CutAfter(left)) => {
                    *link.faults[way as usize].lock().unwrap() = Some(Fault::CutAfter(left - read));
                    read
                }
                Some(Fault::Delay(delay)) => {
                    std::thread::sleep(delay);
                    read
                }
                Some(Fault::HalfClose) => 0,
                None => read,
            };
            if to.write_all(&buffer[..passes]).is_err() {
                while self.drains && way == Way::Down && from.read(&mut buffer).is_ok_and(|read| read > 0) {}
                return link.end();
            }
            match fault {
                Some(Fault::CutAfter(_)) if passes < read => return link.end(),
                Some(Fault::HalfClose) => {
                    let _ = to.shutdown(Shutdown::Write);
                    while from.read(&mut buffer).is_ok_and(|read| read > 0) {}
                    return;
                }
                _ => {}
            }
        }
    }

    fn wait_while_stalled(&self, link: &Link) {
        let mut held = self.changed.0.lock().unwrap();
        while self.mode() == STALLS && !link.ended.load(Ordering::SeqCst) {
            held = self.changed.1.wait(held).unwrap();
        }
    }
}
