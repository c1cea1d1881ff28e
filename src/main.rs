fn main() {
    let mut args = std::env::args().skip(1);
    let (i, o) = (args.next().unwrap(), args.next().unwrap());
    let m = amax::ir::file::load(i.as_ref()).unwrap();
    amax::ir::file::save(&m, o.as_ref()).unwrap();
}
