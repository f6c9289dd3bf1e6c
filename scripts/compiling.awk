# Of what pip prints, only that llama.cpp is compiled; nothing where a wheel of it is there already.
/Building wheel for llama.cpp.python/ && /: started/ {
    print "compiling llama.cpp for this machine, once: about four minutes on two cores"; fflush()
}
/Building wheel for llama.cpp.python/ && /: still running/ {
    print "  still compiling (" ++minutes " min)"; fflush()  # pip says so once a minute
}
/Building wheel for llama.cpp.python/ && /: finished with status 'done'/ { print "compiled"; fflush() }
