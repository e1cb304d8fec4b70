//! Who may do what: polkit decides on the system bus, one action per risk; on other buses whoever can reach them may do everything.

use std::collections::HashMap;
use std::ops::Deref;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::sync::watch;
use zbus::fdo::DBusProxy;
use zbus::message::{Flags, Header};
use zbus::names::{InterfaceName, MemberName};
use zbus::object_server::{DispatchResult, Interface, SignalEmitter};
use zbus::proxy::CacheProperties;
use zbus::{
    BoxDBusError, Connection, Message, ObjectServer, OwnedVariant, Structure, Variant, proxy,
};

use super::Failure;

/// A polkit action, see systemd/org.vdisk1.policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Action {
    /// Read properties and counters.
    Look,
    /// Change what there is.
    Manage,
    /// Name files of the host, which are opened with the daemon's rights.
    OpenAnyPath,
    /// Offer a node to guests.
    Attach,
}

impl Action {
    fn id(self) -> &'static str {
        match self {
            Action::Look => "org.vdisk1.look",
            Action::Manage => "org.vdisk1.manage",
            Action::OpenAnyPath => "org.vdisk1.open-any-path",
            Action::Attach => "org.vdisk1.attach",
        }
    }
}

/// Where whoever may attach makes sockets.
#[derive(Clone, Debug, Default)]
pub struct SocketFolders {
    /// `sockets.directory` of vdiskd.toml.
    pub directory: Option<PathBuf>,
    /// The daemon's own folder, for names that end with `.sock`: it has other files there.
    pub runtime: Option<PathBuf>,
}

impl SocketFolders {
    fn has(&self, path: &Path) -> bool {
        let mut parts = path.components();
        if let (Some(Component::Normal(_)), None) = (parts.next(), parts.next()) {
            return self.directory.is_some();
        }
        let plain = path
            .components()
            .all(|c| !matches!(c, Component::ParentDir));
        let is_in =
            |folder: &Option<PathBuf>| folder.is_some() && path.parent() == folder.as_deref();
        let is_socket = path.extension().is_some_and(|e| e == "sock");
        plain && (is_in(&self.directory) || is_in(&self.runtime) && is_socket)
    }
}

/// Methods that only show something, wherever they are.
const LOOKS: [&str; 3] = ["GetStatistics", "ListThrottleGroups", "GetManagedObjects"];

/// What a call needs.
fn needed(
    interface: &str,
    member: &str,
    message: &Message,
    sockets: &SocketFolders,
) -> Vec<Action> {
    if LOOKS.contains(&member) || (interface, member) == ("org.vdisk1.Node", "GetImageInfo") {
        return vec![Action::Look];
    }
    let attach = member == "AddExport";
    let body = message.body();
    let names_files = match body.deserialize::<Structure<'_>>() {
        Ok(arguments) => arguments
            .fields()
            .iter()
            .any(|value| names_file(member, "", value, sockets)),
        // It has no arguments, or the method will not understand them either.
        Err(_) => !body.is_empty(),
    };
    let action = match attach {
        true => Action::Attach,
        false => Action::Manage,
    };
    match names_files {
        true => vec![action, Action::OpenAnyPath],
        false => vec![action],
    }
}

/// Whether an argument names a file: by its key, or because it looks like a path, which no other name does.
fn names_file(member: &str, key: &str, value: &Variant<'_>, sockets: &SocketFolders) -> bool {
    let last = key.rsplit('.').next().unwrap_or(key);
    match value {
        // Where sockets are is no secret, and no other file can be named there.
        Variant::Str(text) if member == "AddExport" && last == "path" => {
            !sockets.has(Path::new(text.as_str()))
        }
        Variant::ObjectPath(_) => true,
        Variant::Str(text) => {
            text.contains('/')
                || matches!(last, "filename" | "path")
                || (member == "AddSecret" && last == "file")
        }
        Variant::Variant(inner) => names_file(member, key, inner, sockets),
        Variant::Array(items) => items
            .iter()
            .any(|item| names_file(member, key, item, sockets)),
        Variant::Structure(fields) => fields
            .fields()
            .iter()
            .any(|field| names_file(member, key, field, sockets)),
        Variant::Dict(entries) => entries.iter().any(|(key, value)| {
            let key = match key {
                Variant::Str(key) => key.as_str(),
                _ => "",
            };
            names_file(member, key, value, sockets)
        }),
        _ => false,
    }
}

#[proxy(
    interface = "org.freedesktop.PolicyKit1.Authority",
    default_service = "org.freedesktop.PolicyKit1",
    default_path = "/org/freedesktop/PolicyKit1/Authority"
)]
trait Authority {
    /// Whether it is authorized, whether it could be after authentication, and details.
    fn check_authorization(
        &self,
        subject: &(&str, HashMap<&str, Variant<'_>>),
        action: &str,
        details: HashMap<&str, &str>,
        flags: u32,
        cancellation: &str,
    ) -> zbus::Result<(bool, bool, HashMap<String, String>)>;
}

/// CheckAuthorizationFlags: the user may be asked for a password.
const ALLOW_USER_INTERACTION: u32 = 1;

/// How long it is remembered that somebody may look, so that reading properties does not ask each time.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// Those who need no polkit beside root and the daemon's own user (`[access]` of vdiskd.toml).
#[derive(Clone, Debug, Default)]
pub struct Trusted {
    pub users: Vec<u32>,
    pub groups: Vec<u32>,
}

/// Decides.
pub struct Access {
    /// None: whoever can reach the bus may do everything.
    polkit: Option<Polkit>,
    sockets: SocketFolders,
    may_look: Mutex<HashMap<String, Instant>>,
    /// Calls that have come and are not answered yet.
    calls: watch::Sender<usize>,
}

/// A call, until it is answered.
struct Call<'a>(&'a Access);

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.0.calls.send_modify(|calls| *calls -= 1);
    }
}

struct Polkit {
    trusted: Trusted,
    /// A connection for these questions alone: properties are read under a lock of the object server, which must not wait for
    /// an answer that is behind other calls.
    questions: Connection,
}

impl Access {
    pub fn for_everybody() -> Access {
        Access {
            polkit: None,
            sockets: SocketFolders::default(),
            may_look: Mutex::default(),
            calls: watch::Sender::default(),
        }
    }

    pub fn by_polkit(trusted: Trusted, sockets: SocketFolders, questions: Connection) -> Access {
        Access {
            polkit: Some(Polkit { trusted, questions }),
            sockets,
            may_look: Mutex::default(),
            calls: watch::Sender::default(),
        }
    }

    fn call(&self) -> Call<'_> {
        self.calls.send_modify(|calls| *calls += 1);
        Call(self)
    }

    /// Returns when every call that has come is answered.
    pub async fn answered(&self) {
        // It cannot fail: the sender is here.
        let _ = self.calls.subscribe().wait_for(|calls| *calls == 0).await;
    }

    fn remembers(&self, sender: &str) -> bool {
        let mut all = self.may_look.lock().unwrap_or_else(|e| e.into_inner());
        all.retain(|_, since| since.elapsed() < LOOK_AGAIN);
        all.contains_key(sender)
    }

    fn remember(&self, sender: &str) {
        let mut all = self.may_look.lock().unwrap_or_else(|e| e.into_inner());
        all.insert(sender.to_owned(), Instant::now());
    }

    /// Refuses a call whose sender may not do all of `actions`. Nobody is asked for a password by a call that must not wait.
    async fn check(
        &self,
        header: &Header<'_>,
        actions: &[Action],
        may_wait: bool,
    ) -> Result<(), Failure> {
        let Some(Polkit {
            trusted,
            questions: connection,
        }) = &self.polkit
        else {
            return Ok(());
        };
        let Some(sender) = header.sender() else {
            return Err(Failure::NotAuthorized("the call has no sender".into()));
        };
        if actions == [Action::Look] && self.remembers(sender) {
            return Ok(());
        }
        let caller = DBusProxy::builder(connection)
            .cache_properties(CacheProperties::No)
            .build()
            .await?
            .get_connection_credentials(sender.as_ref().into())
            .await
            .map_err(|e| Failure::NotAuthorized(format!("who calls cannot be found out: {e}")))?;
        let uid = caller.unix_user_id().ok_or_else(|| {
            Failure::NotAuthorized("the bus does not know which user calls".into())
        })?;
        let groups = caller.unix_group_ids();
        let is_trusted = uid == 0
            || uid == rustix::process::geteuid().as_raw()
            || trusted.users.contains(&uid)
            || groups.is_some_and(|all| all.iter().any(|g| trusted.groups.contains(g)));
        let flags = header.primary().flags();
        if !is_trusted {
            for action in actions {
                let can_ask = may_wait && flags.contains(Flags::ALLOW_INTERACTIVE_AUTH);
                ask(connection, header, uid, *action, can_ask).await?;
            }
        }
        if actions == [Action::Look] {
            self.remember(sender);
        }
        Ok(())
    }
}

/// Asks polkit.
async fn ask(
    connection: &Connection,
    header: &Header<'_>,
    uid: u32,
    action: Action,
    can_ask: bool,
) -> Result<(), Failure> {
    let denied = |why: String| {
        tracing::warn!(uid, action = action.id(), why, "a call was denied");
        Failure::NotAuthorized(format!(
            "this needs the authorization '{}', {why}: run it as root, or have polkit allow it (polkit(8)), or name the user in vdiskd.toml (access.users)",
            action.id()
        ))
    };
    let object = header.path().map_or("", |p| p.as_str()).to_owned();
    let member = header.member().map_or("", |m| m.as_str()).to_owned();
    let sender = header.sender().map_or("", |s| s.as_str());
    let subject = HashMap::from([("name", Variant::from(sender))]);
    let details = HashMap::from([("object", object.as_str()), ("member", member.as_str())]);
    let authority = AuthorityProxy::builder(connection)
        .cache_properties(CacheProperties::No)
        .build()
        .await?;
    let answer = authority
        .check_authorization(
            &("system-bus-name", subject),
            action.id(),
            details,
            if can_ask { ALLOW_USER_INTERACTION } else { 0 },
            "",
        )
        .await;
    match answer {
        Ok((true, _, _)) => Ok(()),
        Ok((false, true, _)) => Err(denied(
            "which asks for a password, and nobody is there to enter it".into(),
        )),
        Ok((false, false, _)) => Err(denied(
            "which user ".to_owned() + &uid.to_string() + " does not have",
        )),
        Err(e) => Err(denied(format!("and polkit cannot be asked ({e})"))),
    }
}

/// An object that asks before it does something.
pub struct Guarded<T> {
    object: T,
    access: Arc<Access>,
}

impl<T> Guarded<T> {
    pub fn new(object: T, access: &Arc<Access>) -> Guarded<T> {
        Guarded {
            object,
            access: access.clone(),
        }
    }
}

impl<T> Deref for Guarded<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.object
    }
}

#[async_trait]
impl<T: Interface> Interface for Guarded<T> {
    fn name() -> InterfaceName<'static> {
        T::name()
    }

    fn spawn_tasks_for_methods(&self) -> bool {
        self.object.spawn_tasks_for_methods()
    }

    async fn get(
        &self,
        property: &str,
        server: &ObjectServer,
        connection: &Connection,
        header: Option<&Header<'_>>,
        emitter: &SignalEmitter<'_>,
    ) -> Option<Result<OwnedVariant, BoxDBusError>> {
        let _call = self.access.call();
        if let Some(header) = header
            && let Err(e) = self.access.check(header, &[Action::Look], false).await
        {
            return Some(Err(Box::new(e)));
        }
        let object = &self.object;
        object
            .get(property, server, connection, header, emitter)
            .await
    }

    async fn get_all(
        &self,
        server: &ObjectServer,
        connection: &Connection,
        header: Option<&Header<'_>>,
        emitter: &SignalEmitter<'_>,
    ) -> zbus::fdo::Result<HashMap<String, OwnedVariant>> {
        let _call = self.access.call();
        if let Some(header) = header {
            let checked = self.access.check(header, &[Action::Look], false).await;
            checked.map_err(|e| zbus::fdo::Error::AccessDenied(e.to_string()))?;
        }
        self.object
            .get_all(server, connection, header, emitter)
            .await
    }

    fn set<'call>(
        &'call self,
        property: &'call str,
        value: &'call Variant<'_>,
        server: &'call ObjectServer,
        connection: &'call Connection,
        header: Option<&'call Header<'_>>,
        emitter: &'call SignalEmitter<'_>,
    ) -> DispatchResult<'call> {
        let object = &self.object;
        match object.set(property, value, server, connection, header, emitter) {
            DispatchResult::Async(then) => DispatchResult::Async(Box::pin(async move {
                let _call = self.access.call();
                if let Some(header) = header {
                    let action = [Action::Manage];
                    let checked = self.access.check(header, &action, false).await;
                    checked.map_err(|e| Box::new(e) as BoxDBusError)?;
                }
                then.await
            })),
            other => other,
        }
    }

    async fn set_mut(
        &mut self,
        _property: &str,
        _value: &Variant<'_>,
        _server: &ObjectServer,
        _connection: &Connection,
        _header: Option<&Header<'_>>,
        _emitter: &SignalEmitter<'_>,
    ) -> Option<Result<(), BoxDBusError>> {
        // No object of ours changes itself.
        None
    }

    fn call<'call>(
        &'call self,
        server: &'call ObjectServer,
        connection: &'call Connection,
        message: &'call Message,
        name: MemberName<'call>,
    ) -> DispatchResult<'call> {
        match self.object.call(server, connection, message, name.clone()) {
            DispatchResult::Async(then) => DispatchResult::Async(Box::pin(async move {
                let _call = self.access.call();
                let needed = needed(&T::name(), &name, message, &self.access.sockets);
                let header = message.header();
                let checked = self.access.check(&header, &needed, true).await;
                checked.map_err(|e| Box::new(e) as BoxDBusError)?;
                then.await
            })),
            other => other,
        }
    }

    fn call_mut<'call>(
        &'call mut self,
        _server: &'call ObjectServer,
        _connection: &'call Connection,
        _message: &'call Message,
        _name: MemberName<'call>,
    ) -> DispatchResult<'call> {
        DispatchResult::NotFound
    }

    fn introspect_to_writer(&self, writer: &mut dyn std::fmt::Write, level: usize) {
        self.object.introspect_to_writer(writer, level);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call<B: serde::Serialize + zbus::DynamicType>(member: &str, body: &B) -> Vec<Action> {
        let message = Message::method_call("/org/vdisk1", member)
            .interface("org.vdisk1.Manager")
            .build(body)
            .unwrap();
        needed(
            "org.vdisk1.Manager",
            member,
            &message,
            &SocketFolders::default(),
        )
    }

    fn options<'a>(pairs: &[(&'a str, &'a str)]) -> HashMap<&'a str, Variant<'a>> {
        pairs.iter().map(|(k, v)| (*k, Variant::from(*v))).collect()
    }

    #[test]
    fn paths_are_found_wherever_they_are() {
        let without = [Action::Manage];
        let with = [Action::Manage, Action::OpenAnyPath];
        assert_eq!(
            call(
                "AddNode",
                &options(&[("driver", "null-co"), ("file", "disk0")])
            ),
            without
        );
        for given in [
            options(&[("filename", "disk.img")]),
            options(&[("file.filename", "disk.img")]),
            options(&[("whatever", "/etc/shadow")]),
        ] {
            assert_eq!(call("AddNode", &given), with, "{given:?}");
        }
        let child = Variant::from(options(&[("filename", "x")]));
        let nested = HashMap::from([("file", child)]);
        assert_eq!(call("AddNode", &nested), with);
        assert_eq!(call("AddSecret", &("s", options(&[("file", "key")]))), with);
        assert_eq!(
            call("AddSecret", &("s", options(&[("data", "key")]))),
            without
        );
        let actions = vec![("add-overlay", options(&[("file.filename", "x")]))];
        assert_eq!(call("Transaction", &(actions, options(&[]))), with);
        assert_eq!(call("GetStatistics", &options(&[])), [Action::Look]);
        let folders = SocketFolders {
            directory: Some("/run/sockets".into()),
            runtime: Some("/run/vdiskd".into()),
        };
        for path in ["vm.sock", "/run/sockets/vm", "/run/vdiskd/vm.sock"] {
            assert!(folders.has(Path::new(path)), "{path}");
        }
        for path in [
            "/run/other/vm.sock",
            "/run/vdiskd/state.new",
            "/run/vdiskd/../other/vm.sock",
            "../vm.sock",
            "srv/vm.sock",
            "",
        ] {
            assert!(!folders.has(Path::new(path)), "{path}");
        }
        assert!(!SocketFolders::default().has(Path::new("vm.sock")));
        assert_eq!(
            call(
                "AddExport",
                &options(&[("addr.path", "/run/other/vm.sock")])
            ),
            [Action::Attach, Action::OpenAnyPath]
        );
        assert_eq!(
            call("AddExport", &options(&[("addr.str", "vm")])),
            [Action::Attach]
        );
        let path = zbus::ObjectPath::try_from("/etc/shadow").unwrap();
        let odd = HashMap::from([("x", Variant::from(path))]);
        assert_eq!(call("AddNode", &odd), with);
        assert_eq!(call("Remove", &options(&[])), without);
    }
}
