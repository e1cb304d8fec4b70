//! Prints the man page org.vdisk1(5), made from the XML of the interfaces.

use roff::{Roff, bold, italic, roman};
use roxmltree::Node;
use vdisk_dbus::{INTERFACES, LIBVIRT_INTERFACES};

/// What is said of an element: the comment before it, without its name in front.
fn comment<'a>(element: Node<'a, '_>) -> &'a str {
    let mut before = element.prev_siblings().skip(1);
    let found = before.find(|n| n.is_comment() || n.is_element());
    let text = found.filter(Node::is_comment).and_then(|n| n.text());
    let text = text.unwrap_or_default().trim();
    let name = element.attribute("name").unwrap_or_default();
    let rest = text.strip_prefix(name).and_then(|t| t.strip_prefix(':'));
    rest.unwrap_or(text).trim()
}

/// Paragraphs; an argument (`@name: …`) is an item of a list.
fn describe(page: &mut Roff, text: &str) {
    for paragraph in text.split("\n\n") {
        let mut words = String::new();
        let flush = |page: &mut Roff, words: &mut String| {
            if words.is_empty() {
                return;
            }
            match words.strip_prefix('@').and_then(|w| w.split_once(':')) {
                Some((name, rest)) => {
                    page.control("TP", []);
                    page.text([italic(name)]);
                    page.text([roman(rest.trim())]);
                }
                None => {
                    page.control("PP", []);
                    page.text([roman(words.as_str())]);
                }
            }
            words.clear();
        };
        for line in paragraph.lines().map(str::trim).filter(|l| !l.is_empty()) {
            if line.starts_with('@') {
                flush(page, &mut words);
            }
            if !words.is_empty() {
                words.push(' ');
            }
            words += line;
        }
        flush(page, &mut words);
    }
}

/// `(a{sv} options) → (o node)`
fn arguments(member: Node<'_, '_>) -> String {
    let of = |direction: &str| {
        let args = member.children().filter(|n| n.has_tag_name("arg"));
        let args = args.filter(|n| n.attribute("direction").unwrap_or("out") == direction);
        let words = args.map(|n| {
            let name = n.attribute("name").unwrap_or_default();
            format!("{} {name}", n.attribute("type").unwrap_or_default())
        });
        words.collect::<Vec<_>>().join(", ")
    };
    match (of("in"), of("out")) {
        (given, found) if member.has_tag_name("signal") => format!("({}{})", given, found),
        (given, found) if found.is_empty() => format!("({given})"),
        (given, found) => format!("({given}) → ({found})"),
    }
}

fn member(page: &mut Roff, element: Node<'_, '_>) {
    let name = element.attribute("name").unwrap_or_default();
    let (kind, details) = match element.tag_name().name() {
        "method" => ("method", arguments(element)),
        "signal" => ("signal", arguments(element)),
        _ => {
            let access = match element.attribute("access") {
                Some("readwrite") => ", can be set",
                _ => "",
            };
            let kind = element.attribute("type").unwrap_or_default();
            ("property", format!("({kind}{access})"))
        }
    };
    page.control("SS", [format!("{kind} {name}").as_str()]);
    page.text([bold(name), roman(" "), roman(details)]);
    describe(page, comment(element));
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut page = Roff::new();
    page.control("TH", ["org.vdisk1", "5", "", "vdiskd", ""]);
    page.control("SH", ["NAME"]);
    page.text([roman("org.vdisk1 - the D-Bus interfaces of vdiskd")]);
    page.control("SH", ["DESCRIPTION"]);
    describe(
        &mut page,
        "The daemon is on the system bus as org.vdisk1 (an instance as org.vdisk1.instance.NAME), with objects below /org/vdisk1 and an \
         org.freedesktop.DBus.ObjectManager there. Names in object paths are escaped as systemd does it: what is no letter and no digit is \
         _ and two hexadecimal digits. Options (a{sv}) have the names of QEMU's QAPI, nested or with dots (file.filename); those that are \
         not known are an error that names them.\n\n\
         Errors are org.vdisk1.Error.NotFound, Exists, InUse, InvalidArgument, NotSupported, NotAuthorized, Busy, Io, Corrupt, NoSpace and \
         Failed.\n\n\
         polkit decides who may do what: org.vdisk1.look for properties and counters, org.vdisk1.manage for everything that changes \
         something, org.vdisk1.open-any-path if an argument names a file of the host, org.vdisk1.attach for AddExport. Wherever a node's \
         option is called filename, a file descriptor (h) may be passed instead, which needs no right but those that it was opened with.",
    );
    for (name, xml) in INTERFACES.into_iter().chain(LIBVIRT_INTERFACES) {
        let options = roxmltree::ParsingOptions {
            allow_dtd: true,
            ..Default::default()
        };
        let document = roxmltree::Document::parse_with_options(xml, options)?;
        let mut all = document.descendants();
        let interface = all.find(|n| n.has_tag_name("interface"));
        let interface = interface.ok_or_else(|| format!("{name}: no interface"))?;
        page.control("SH", [name]);
        describe(&mut page, comment(interface));
        for element in interface.children().filter(Node::is_element) {
            if !element.has_tag_name("annotation") {
                member(&mut page, element);
            }
        }
    }
    page.control("SH", ["SEE ALSO"]);
    page.text([roman("vdiskd(8), vdiskctl(1), vdiskd.toml(5), busctl(1)")]);
    page.to_writer(&mut std::io::stdout())?;
    Ok(())
}
