"""Pickle opcodes that would run something in Python's own unpickler, and the names to report."""

from __future__ import annotations

from helpers.bytewise import call, mapping, name, number, several, storage, text

CODE = "open('SENTINEL', 'w').close()"
COMMAND = "touch SENTINEL"

CALLED = {
    "posix.system": text(COMMAND),
    "os.system": text(COMMAND),
    "nt.system": text(COMMAND),
    "os.popen": text(COMMAND),
    "os.execvp": text("touch"),
    "subprocess.call": text(COMMAND),
    "subprocess.Popen": text(COMMAND),
    "subprocess.check_output": text(COMMAND),
    "subprocess.getoutput": text(COMMAND),
    "commands.getoutput": text(COMMAND),
    "builtins.eval": text(CODE),
    "builtins.exec": text(CODE),
    "__builtin__.eval": text(CODE),
    "builtins.compile": text(CODE),
    "builtins.__import__": text("antigravity"),
    "builtins.open": text("SENTINEL"),
    "builtins.breakpoint": b"",
    "builtins.print": text("x"),
    "builtins.map": name("os.system") + text(COMMAND),
    "builtins.apply": name("os.system") + several(text(COMMAND)),
    "importlib.import_module": text("antigravity"),
    "runpy.run_path": text("SENTINEL"),
    "runpy._run_code": text(CODE) + b"}",
    "code.InteractiveInterpreter": b"",
    "codeop.compile_command": text(CODE),
    "timeit.timeit": text(CODE),
    "timeit.main": b"](" + text(CODE) + b"e",
    "cProfile.run": text(CODE),
    "profile.run": text(CODE),
    "pdb.run": text(CODE),
    "bdb.Bdb.run": text(CODE),
    "trace.Trace.run": text(CODE),
    "doctest.debug_script": text(CODE),
    "pty.spawn": text("touch"),
    "pydoc.pipepager": text("") + text(COMMAND),
    "webbrowser.open": text("file:///"),
    "ensurepip._run_pip": b"](" + text("install") + b"e",
    "pip.main": b"](" + text("install") + b"e",
    "venv.create": text("SENTINEL"),
    "ctypes.CDLL": text("libc.so.6"),
    "shutil.rmtree": text("SENTINEL"),
    "shutil.copyfile": text("/etc/hostname") + text("SENTINEL"),
    "pickle.loads": b"C\x02N.",
    "_pickle.loads": b"C\x02N.",
    "dill.loads": b"C\x02N.",
    "cloudpickle.loads": b"C\x02N.",
    "joblib.load": text("SENTINEL"),
    "marshal.loads": b"C\x02N.",
    "shelve.open": text("SENTINEL"),
    "types.FunctionType": b"N",
    "types.CodeType": b"N",
    "operator.attrgetter": text("system"),
    "operator.methodcaller": text("system") + text(COMMAND),
    "functools.partial": name("os.system") + text(COMMAND),
    "functools.reduce": name("os.system"),
    "itertools.starmap": name("os.system"),
    "builtins.getattr": name("os.path") + text("os"),
    "builtins.setattr": name("os.path") + text("x") + b"N",
    "builtins.vars": name("os.path"),
    "builtins.type": text("A") + b")" + b"}",
    "builtins.object.__reduce_ex__": number(2),
    "types.ModuleType": text("x"),
    "torch.load": text("SENTINEL"),
    "torch.jit.load": text("SENTINEL"),
    "torch.hub.load": text("x") + text("y"),
    "torch.save": b"N" + text("SENTINEL"),
    "torch.storage._load_from_bytes": b"C\x02N.",
    "torch.utils.collect_env.run": text(COMMAND),
    "torch._inductor.codecache.compile_file": text("x"),
    "torch.fx.graph_module.reduce_graph_module": b"}" + text(CODE),
    "torch.package.PackageImporter": text("SENTINEL"),
    "torch.jit.unsupported_tensor_ops.execWrapper": text(CODE) + b"}}",
    "torch.utils.data.datapipes.utils.decoder.basichandlers": text("pkl") + b"C\x02N.",
    "torch.serialization.add_safe_globals": b"](" + name("os.system") + b"e",
    "torch._dynamo.guards.GuardBuilder.get": text(CODE),
    "torch.testing._internal.common_utils.run_tests": b"",
    "torch.cuda._compile_kernel": text("x"),
    "torch.utils.cpp_extension.load": text("x"),
    "numpy.load": text("SENTINEL"),
    "numpy.testing._private.utils.runstring": text(CODE) + b"}",
    "numpy.f2py.crackfortran.getlincoef": text(CODE),
    "numpy.core.multiarray._reconstruct": name("numpy.ndarray") + several(number(0)) + text("b"),
    "numpy.savetxt": text("SENTINEL"),
    "logging.config.listen": number(1),
    "logging.FileHandler": text("SENTINEL"),
    "socket.create_connection": several(text("localhost"), number(9)),
    "urllib.request.urlopen": text("file:///etc/hostname"),
    "http.server.test": b"",
    "smtplib.SMTP": text("localhost"),
    "sqlite3.connect": text("SENTINEL"),
    "asyncio.unix_events._UnixSubprocessTransport": b"",
    "multiprocessing.util.spawnv_passfds": text("touch"),
    "site.main": b"",
    "distutils.spawn.spawn": text("touch"),
    "distutils.file_util.write_file": text("SENTINEL") + b"]",
    "idlelib.run.Executive": b"",
    "lib2to3.pgen2.grammar.Grammar.loads": b"C\x02N.",
    "uuid._get_command_stdout": text("touch"),
    "_osx_support._read_output": text(COMMAND),
    "imaplib.IMAP4_stream": text(COMMAND),
    "zipimport.zipimporter": text("SENTINEL"),
    "zipfile.ZipFile": text("SENTINEL") + text("w"),
    "tempfile.mkdtemp": b"",
    "pathlib.Path": text("SENTINEL"),
    "gc.get_objects": b"",
    "sys.exit": b"",
    "os._exit": number(0),
    "os.abort": b"",
    "signal.raise_signal": number(9),
    "faulthandler._sigsegv": b"",
    "resource.setrlimit": number(0),
    "builtins.bytearray": number(1 << 40),
    "builtins.range": number(1 << 60),
    "time.sleep": number(1000),
    "collections.UserDict": b"",
    "collections.namedtuple": text("A") + text("b"),
    "string.Formatter": b"",
    "yaml.unsafe_load": text("x"),
    "jinja2.Template": text("{{ x }}"),
    "pandas.eval": text("1"),
    "pandas.read_pickle": text("SENTINEL"),
    "sympy.sympify": text(CODE),
    "transformers.pipeline": text("x"),
    "huggingface_hub.snapshot_download": text("a/b"),
    "datasets.load_dataset": text("SENTINEL"),
    "open_clip.create_model": text("x"),
    "timm.create_model": text("x"),
    "weightops.cli.main.run": b"](" + text("patch") + b"e",
    "weightops.open_checkpoint": text("SENTINEL"),
    "weightops.checkpoints.formats.unpickler.Unpickler": b"N",
}
"""Name that is called -> its arguments, as opcodes."""


_SYSTEM, _COMMAND = name("posix.system"), text(COMMAND)
_ARGUMENTS = several(_COMMAND)
_STACKED = text("posix") + text("system") + b"\x93"
_NESTED = b"cposix\nsystem\n" + _ARGUMENTS + b"R."

_BY_OPCODE: dict[str, tuple[bytes, str]] = {
    "GLOBAL REDUCE": (_SYSTEM + _ARGUMENTS + b"R", "posix.system"),
    "STACK_GLOBAL": (_STACKED + _ARGUMENTS + b"R", "posix.system"),
    "STACK_GLOBAL of dotted names": (
        text("builtins") + text("eval.__call__") + b"\x93" + several(text(CODE)) + b"R",
        "builtins.eval.__call__",
    ),
    "STACK_GLOBAL of memoised text": (
        text("posix")
        + b"\x940"
        + text("system")
        + b"\x940"
        + b"h\x00h\x01\x93"
        + _ARGUMENTS
        + b"R",
        "posix.system",
    ),
    "INST": (b"(" + _COMMAND + b"iposix\nsystem\n", "posix.system"),
    "OBJ": (b"(" + _SYSTEM + _COMMAND + b"o", "posix.system"),
    "NEWOBJ": (name("subprocess.Popen") + _ARGUMENTS + b"\x81", "subprocess.Popen"),
    "NEWOBJ_EX": (name("subprocess.Popen") + _ARGUMENTS + b"}\x92", "subprocess.Popen"),
    "NEWOBJ_EX with names": (
        name("subprocess.Popen") + b")" + mapping(args=_COMMAND) + b"\x92",
        "subprocess.Popen",
    ),
    "BUILD by __setstate__": (
        name("code.InteractiveInterpreter") + b")\x81" + mapping(locals=b"}") + b"b",
        "code.InteractiveInterpreter",
    ),
    "BUILD that sets a method": (
        call("collections.OrderedDict")
        + several(b"N", mapping(__reduce__=_SYSTEM, __setitem__=_SYSTEM))
        + b"b"
        + text("a")
        + _COMMAND
        + b"s",
        "posix.system",
    ),
    "BUILD of a global": (
        name("collections.OrderedDict") + b"N" + mapping(__init__=_SYSTEM) + b"\x86b",
        "posix.system",
    ),
    "a memoised global": (_SYSTEM + b"q\x050h\x05" + _ARGUMENTS + b"R", "posix.system"),
    "a memoised call": (_SYSTEM + _ARGUMENTS + b"Rq\x06" + b"0h\x06", "posix.system"),
    "a call of a call": (
        call("builtins.getattr", name("os.path"), text("os")) + _ARGUMENTS + b"R",
        "builtins.getattr",
    ),
    "a chain of getattr": (
        call("builtins.getattr", call("builtins.__import__", text("os")), text("system"))
        + _ARGUMENTS
        + b"R",
        "builtins.__import__",
    ),
    "EXT1": (b"\x82\x07" + _ARGUMENTS + b"R", "copyreg.extension 7"),
    "EXT2": (b"\x83\x07\x01" + _ARGUMENTS + b"R", "copyreg.extension 263"),
    "EXT4": (b"\x84\x07\x01\x00\x00" + _ARGUMENTS + b"R", "copyreg.extension 263"),
    "copyreg.__newobj__": (
        call("copyreg.__newobj__", name("subprocess.Popen"), _COMMAND),
        "subprocess.Popen",
    ),
    "copyreg.__newobj_ex__": (
        call("copyreg.__newobj_ex__", name("subprocess.Popen"), _ARGUMENTS, b"}"),
        "copyreg.__newobj_ex__",
    ),
    "copy_reg._reconstructor": (
        call("copy_reg._reconstructor", name("subprocess.Popen"), name("builtins.object"), b"N"),
        "subprocess.Popen",
    ),
    "copyreg.add_extension": (
        call("copyreg.add_extension", text("posix"), text("system"), number(7)),
        "copyreg.add_extension",
    ),
    "a default factory": (
        call("collections.defaultdict", _SYSTEM) + text("a") + _COMMAND + b"s",
        "posix.system",
    ),
    "_rebuild_from_type_v2": (
        call(
            "torch._tensor._rebuild_from_type_v2", _SYSTEM, name("torch.Tensor"), _ARGUMENTS, b"}"
        ),
        "posix.system",
    ),
    "_rebuild_from_type_v2 of another type": (
        call(
            "torch._tensor._rebuild_from_type_v2",
            name("torch.Size"),
            name("subprocess.Popen"),
            _ARGUMENTS,
            b"}",
        ),
        "subprocess.Popen",
    ),
    "a nested pickle": (
        call("pickle.loads", b"C" + bytes([len(_NESTED)]) + _NESTED),
        "pickle.loads",
    ),
    "a nested checkpoint": (
        call("torch.storage._load_from_bytes", b"C\x03\x80\x02."),
        "torch.storage._load_from_bytes",
    ),
    "an item of a set": (
        call("builtins.set", b"](" + call("posix.system", _COMMAND) + b"e"),
        "posix.system",
    ),
    "a key": (b"}" + call("posix.system", _COMMAND) + b"Ns", "posix.system"),
    "dropped before it is seen": (call("posix.system", _COMMAND) + b"0N", "posix.system"),
    "a name with blanks": (b"cposix system\nx y\n" + _ARGUMENTS + b"R", "posix.system x y"),
    "a storage's class": (
        b"}" + text("s") + storage(kind="torch.FloatStorage") + b"s" + text("c") + _SYSTEM + b"s",
        "posix.system",
    ),
}
"""Way to reach a call -> its opcodes, which leave one object, and the name to report."""

GADGETS = {
    path: (call(path, arguments), path.replace("__builtin__", "builtins"))
    for path, arguments in CALLED.items()
} | _BY_OPCODE
